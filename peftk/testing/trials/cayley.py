"""Trials of the Cayley transform, and how orthogonal its results are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import functional
from ...nn.oft import SERIES_REFUSED, SERIES_WARNS
from ..compare import LIMITS
from ._trial import FEATURES, SIZE, Report, Trial

TERMS = 5


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


def trials(normal: Callable[..., Tensor]) -> list[Trial]:
    """Return the trials of this family."""
    packed = normal(FEATURES // SIZE, SIZE * (SIZE - 1) // 2, spread=0.05)
    return [
        Trial(
            "cayley",
            "exact",
            {"skew": packed},
            {"block_size": SIZE},
            lambda skew: _exact(skew, SIZE),
        ),
        Trial(
            "cayley",
            f"{TERMS} terms",
            {"skew": packed},
            {"block_size": SIZE, "neumann_terms": TERMS},
            lambda skew: _neumann(skew, SIZE),
        ),
    ]


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
                    "meaning": _meaning(None if terms is None else inherent),
                    "status": "passed" if abs(found - inherent) <= limit else "failed",
                }
            )
    return rows
