"""What the doctor runs: the marked cases of every operator, forward and backward, and how orthogonal rotations are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..nn.oft_rotation import SERIES_REFUSED, SERIES_WARNS
from ..runtime import registry, settings
from .cases import Case, Inputs, all_cases
from .cases.cayley import transform
from .compare import LIMITS, error

Report = dict[str, Any]
TERMS = 5
"""Terms of the series whose orthogonality is measured."""


def doctor_cases() -> list[Case]:
    """Return the cases that are marked for the doctor."""
    return [case for case in all_cases() if case.doctor]


def _moved(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    # Rounded to float32 once, so that all dtypes start from the same numbers.
    rounded = case.cast(case.cast(case.inputs(), torch.float32), dtype)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in rounded.items()}


def _forward_backward(function: Callable[..., Tensor], case: Case, inputs: Inputs) -> list[Tensor]:
    wanted = [inputs[name].requires_grad_() for name in case.gradients]
    y = function(**inputs)
    # A mean of one: sums over tokens do not cancel, so that relative errors mean something.
    grad = 1 + torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, wanted, grad)] if wanted else [y]


def run_case(case: Case, backend: str, device: str = "cpu") -> Report:
    """Run a case on one backend in float32, and say how far it is from its formula in float64."""
    limit = LIMITS[torch.float32]
    found: Report = {
        "operator": case.operator,
        "variant": case.name,
        "backend": backend,
        "device": device,
        "status": "failed",
        "error": None,
        "limit": limit,
        "reason": None,
    }
    inputs = _moved(case, device, torch.float32)
    explained = registry.explain(case.operator, **inputs)
    reason = next(c.reason for c in explained.candidates if c.backend == backend)
    if reason is not None:
        return found | {"status": "unavailable", "reason": reason}
    truth = _forward_backward(case.formula, case, _moved(case, "cpu", torch.float64))
    try:
        with settings.use_backend(backend):
            results = _forward_backward(case.function, case, inputs)
    except Exception as failure:  # whatever a broken kernel raises is what the report is for
        return found | {"reason": f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"}
    errors = [error(r.cpu(), t).largest for r, t in zip(results, truth, strict=True)]
    if not all(map(math.isfinite, errors)):
        return found | {"reason": "the result is not finite"}
    worst = max(errors)
    return found | {"error": worst, "status": "passed" if worst <= limit else "failed"}


def _spectral_norms(packed: Tensor, size: int) -> Tensor:
    row, column = torch.triu_indices(size, size, 1)
    upper = packed.new_zeros(len(packed), size, size)
    upper[:, row, column] = packed
    return torch.linalg.matrix_norm(upper - upper.mT, ord=2)


def _meaning(inherent: float | None) -> str:
    """Say what the error of a transform means for who trains with it."""
    if inherent is None:
        return "rounding of float32; R is a rotation"
    if inherent <= SERIES_WARNS:
        return "the series' own error, not rounding; small"
    refused = ", safe_merge refuses" if inherent > SERIES_REFUSED else ""
    return f"the series' own error: not a rotation; OFT warns{refused}"


def orthogonality(norms: tuple[float, ...] = (0.1, 0.5, 1.0), size: int = 32) -> list[Report]:
    """Measure max |R R^T - I| of the transforms on skew-symmetric blocks of given spectral norms.

    The exact transform passes if its error is that of float32. The series is not orthogonal by design: it passes if
    its error is the one that the same series has in float64, the ``inherent`` error: that says that it is computed
    right, not that it is a rotation. What its size means is in ``meaning``.
    """
    packed = torch.randn(4, size * (size - 1) // 2, generator=torch.Generator().manual_seed(0))
    spectral = _spectral_norms(packed, size)[:, None]
    eye, rows = torch.eye(size, dtype=torch.float64), []

    def distance(blocks: Tensor) -> float:
        blocks = blocks.double()
        return (blocks @ blocks.mT - eye).abs().max().item()

    for terms in (None, TERMS):
        for norm in norms:
            scaled = packed / spectral * norm
            found = distance(functional.cayley(scaled, size, neumann_terms=terms))
            inherent = 0.0 if terms is None else distance(transform(scaled.double(), size, terms))
            limit = LIMITS[torch.float32]
            rows.append(
                {
                    "transform": "exact" if terms is None else f"neumann, {terms} terms",
                    "block_size": size,
                    "norm": norm,
                    "error": found,
                    "inherent": inherent,
                    "limit": limit,
                    "meaning": _meaning(None if terms is None else inherent),
                    "status": "passed" if abs(found - inherent) <= limit else "failed",
                }
            )
    return rows
