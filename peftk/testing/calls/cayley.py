"""Calls of the Cayley transform: the exact one, and the series."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ._kind import ALL_BACKENDS, Kind, Normal, Timed, kernel

if TYPE_CHECKING:
    from . import Call

NEUMANN = [1.0, 2.0, 2.0, 2.0, 1.0]
"""The coefficients of five terms, the default of the field."""


def _fits(features: int, out: int, size: int) -> bool:
    return features % size == 0


def _cayley(call: Call, normal: Normal) -> tuple[Any, ...]:
    count, size = call.features // call.size, call.size
    packed = normal(count, size * (size - 1) // 2, spread=0.3 / size)
    polynomial = NEUMANN if call.variant == "neumann" else []
    if not call.backward:
        return packed, size, polynomial
    blocks = kernel("cayley", "torch")(packed.double(), size, polynomial).float()
    return normal(count, size, size), packed, blocks, polynomial


KINDS = {
    "cayley": Kind(
        _cayley,
        "block",
        32,
        square=True,
        tokens=False,
        dtypes=(torch.float32,),
        variants=("exact", "neumann"),
        fits=_fits,
        backends=ALL_BACKENDS,
        threads="equal bits",
        sums="parameters",
        timed=Timed.at(32, 256),
        gpu_sizes=(32, 64, 256),
    )
}
