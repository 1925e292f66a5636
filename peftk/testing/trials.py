"""Small trials of every public operator, forward and backward, against dense algebra in float64: what the doctor runs.

They need nothing but torch, unlike the cases of the tests, and take no time to speak of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _config, _registry, functional
from .compare import LIMITS, error

TERMS = 5

Report = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One operator on small inputs, and its dense formula.

    Attributes:
        operator: the name of the public function.
        variant: tells the trials of one operator apart; empty if there is only one.
        inputs: its tensors by name; all of them are differentiated in, except a weight.
        options: its other arguments.
        formula: the operator on these tensors in plain dense algebra.
    """

    operator: str
    variant: str
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    formula: Callable[..., Tensor]

    def call(self, **inputs: Tensor) -> Tensor:
        """Run the public function."""
        return getattr(functional, self.operator)(**inputs, **self.options)


def _skew(packed: Tensor, size: int) -> Tensor:
    row, column = torch.triu_indices(size, size, 1, device=packed.device)
    block = torch.arange(len(packed), device=packed.device)[:, None]
    upper = packed.new_zeros(len(packed), size, size).index_put((block, row, column), packed)
    return upper - upper.mT


def _exact(packed: Tensor, size: int) -> Tensor:
    skew = _skew(packed, size)
    eye = torch.eye(size, dtype=packed.dtype, device=packed.device)
    return (eye - skew) @ torch.linalg.inv(eye + skew)


def _neumann(packed: Tensor, size: int) -> Tensor:
    skew = _skew(packed, size)
    eye = torch.eye(size, dtype=packed.dtype, device=packed.device)
    # The last of the five terms has half the weight of the others.
    return eye + 2 * skew + 2 * skew @ skew + 2 * skew @ skew @ skew + skew @ skew @ skew @ skew


def trials(device: str = "cpu") -> list[Trial]:
    """Return a trial of every public operator."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * spread).to(device)

    size, tokens, features, out, rank = 8, 33, 64, 48, 4
    x, weight, bias = normal(tokens, features), normal(out, features, spread=features**-0.5), normal(out)
    blocks, packed = normal(8, size, size, spread=size**-0.5), normal(8, size * (size - 1) // 2, spread=0.05)
    a, b = normal(rank, features, spread=features**-0.5), normal(out, rank, spread=rank**-0.5)
    base, scale = normal(tokens, out), 0.5
    return [
        Trial(
            "block_rotate",
            "",
            {"x": x, "blocks": blocks},
            {},
            lambda x, blocks: x @ torch.block_diag(*blocks),
        ),
        Trial(
            "block_rotate_linear",
            "",
            {"x": x, "weight": weight, "bias": bias, "blocks": blocks},
            {},
            lambda x, weight, bias, blocks: x @ torch.block_diag(*blocks) @ weight.mT + bias,
        ),
        Trial(
            "cayley",
            "exact",
            {"packed": packed},
            {"block_size": size},
            lambda packed: _exact(packed, size),
        ),
        Trial(
            "cayley",
            f"{TERMS} terms",
            {"packed": packed},
            {"block_size": size, "neumann_terms": TERMS},
            lambda packed: _neumann(packed, size),
        ),
        Trial(
            "low_rank_add",
            "",
            {"base": base, "x": x, "a": a, "b": b},
            {"scale": scale},
            lambda base, x, a, b: base + scale * x @ (b @ a).mT,
        ),
        Trial(
            "low_rank_linear",
            "",
            {"x": x, "weight": weight, "bias": bias, "a": a, "b": b},
            {"scale": scale},
            lambda x, weight, bias, a, b: x @ (weight + scale * b @ a).mT + bias,
        ),
    ]


def _forward_backward(function: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = {k: v.detach().to(dtype).requires_grad_(k != "weight") for k, v in inputs.items()}
    y = function(**leaves)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
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
    explained = _registry.explain(trial.operator, **trial.inputs, **trial.options)
    reason = next(c.reason for c in explained.candidates if c.backend == backend)
    if reason is not None:
        return found | {"status": "unavailable", "reason": reason}
    truth = _forward_backward(trial.formula, trial.inputs, torch.float64)
    try:
        with _config.use_backend(backend):
            results = _forward_backward(trial.call, trial.inputs, torch.float32)
    except Exception as failure:  # whatever a broken kernel raises is what the report is for
        return found | {"reason": f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"}
    errors = [error(r, t).largest for r, t in zip(results, truth, strict=True)]
    if not all(map(math.isfinite, errors)):
        return found | {"reason": "the result is not finite"}
    worst = max(errors)
    return found | {"error": worst, "status": "passed" if worst <= limit else "failed"}


def orthogonality(norms: tuple[float, ...] = (0.1, 0.5, 1.0), size: int = 32) -> list[Report]:
    """Measure max |R R^T - I| of the transforms on skew-symmetric blocks of given spectral norms.

    The exact transform passes if its error is that of float32. The series is not orthogonal by design: it passes if
    its error is the one that the same series has in float64, the ``inherent`` error.
    """
    packed = torch.randn(4, size * (size - 1) // 2, generator=torch.Generator().manual_seed(0))
    spectral = torch.linalg.matrix_norm(_skew(packed, size), ord=2)[:, None]
    eye, rows = torch.eye(size, dtype=torch.float64), []

    def distance(blocks: Tensor) -> float:
        blocks = blocks.double()
        return (blocks @ blocks.mT - eye).abs().max().item()

    for terms in (None, TERMS):
        for norm in norms:
            scaled = packed / spectral * norm
            found = distance(functional.cayley(scaled, size, neumann_terms=terms))
            inherent = 0.0 if terms is None else distance(_neumann(scaled.double(), size))
            limit = LIMITS[torch.float32]
            rows.append(
                {
                    "transform": "exact" if terms is None else f"neumann, {terms} terms",
                    "block_size": size,
                    "norm": norm,
                    "error": found,
                    "inherent": inherent,
                    "limit": limit,
                    "status": "passed" if abs(found - inherent) <= limit else "failed",
                }
            )
    return rows
