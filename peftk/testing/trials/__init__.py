"""Small trials of every public operator, forward and backward, against dense algebra in float64: what the doctor runs.

They need nothing but torch, unlike the cases of the tests, and take no time to speak of. The file of a family's name
in this package makes its trials.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ... import ops
from ...runtime import registry, settings
from ..compare import LIMITS, error
from ._trial import Report, Trial
from .cayley import orthogonality

__all__ = ["Report", "Trial", "orthogonality", "run_trial", "trials"]


def trials(device: str = "cpu") -> list[Trial]:
    """Return a trial of every public operator."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * spread).to(device)

    modules = (importlib.import_module(f"{__name__}.{family}") for family in ops.__all__)
    return [trial for module in modules for trial in module.trials(normal)]


def _forward_backward(function: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = {k: v.detach().to(dtype).requires_grad_(k != "weight") for k, v in inputs.items()}
    y = function(**leaves)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    if not y.requires_grad:
        return [y]
    return [y, *torch.autograd.grad(y, [v for v in leaves.values() if v.requires_grad], grad)]


def run_trial(trial: Trial, backend: str) -> Report:
    """Run a trial on one backend, and say how far it is from float64."""
    limit = LIMITS[torch.float32]
    found: Report = {
        "operator": trial.operator,
        "variant": trial.variant,
        "backend": backend,
        "device": next(iter(trial.inputs.values())).device.type,
        "status": "failed",
        "error": None,
        "limit": limit,
        "reason": None,
    }
    explained = registry.explain(trial.operator, **trial.inputs, **trial.options)
    reason = next(c.reason for c in explained.candidates if c.backend == backend)
    if reason is not None:
        return found | {"status": "unavailable", "reason": reason}
    truth = _forward_backward(trial.formula, trial.inputs, torch.float64)
    try:
        with settings.use_backend(backend):
            results = _forward_backward(trial.call, trial.inputs, torch.float32)
    except Exception as failure:  # whatever a broken kernel raises is what the report is for
        return found | {"reason": f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"}
    errors = [error(r, t).largest for r, t in zip(results, truth, strict=True)]
    if not all(map(math.isfinite, errors)):
        return found | {"reason": "the result is not finite"}
    worst = max(errors)
    return found | {"error": worst, "status": "passed" if worst <= limit else "failed"}
