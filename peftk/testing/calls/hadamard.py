"""Calls of the Hadamard product of two low-rank matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ._kind import ALL_BACKENDS, Kind, Normal, Timed

if TYPE_CHECKING:
    from . import Call


def _factors(call: Call, normal: Normal) -> tuple[Any, ...]:
    rank, spread = call.size, call.size**-0.5
    w1_a, w1_b = normal(call.out, rank), normal(rank, call.features, spread=spread)
    return w1_a, w1_b, normal(call.out, rank), normal(rank, call.features, spread=spread)


def _khatri_rao(call: Call, normal: Normal) -> tuple[Any, ...]:
    factors = _factors(call, normal)
    if not call.backward:
        return *factors, None
    rank = call.size**2
    return normal(rank, call.features), normal(call.out, rank), *factors, True, True, True, True


def _weight(call: Call, normal: Normal) -> tuple[Any, ...]:
    # The weight, or the incoming gradient.
    large = normal(call.out, call.features, dtype=call.dtype)
    needs = (True, True, True, True) if call.backward else ()
    return large, *_factors(call, normal), 1.5, *needs


KINDS = {
    "khatri_rao": Kind(
        _khatri_rao,
        "rank",
        8,
        tokens=False,
        dtypes=(torch.float32,),
        # Of larger ranks the weight is written.
        fits=lambda features, out, size: size <= 16,
        backends=ALL_BACKENDS,
        threads="equal bits",
        sums="activations",
        timed=Timed.at(8),
        gpu_sizes=(8,),
    ),
    "hadamard_weight": Kind(
        _weight,
        "rank",
        8,
        tokens=False,
        backends=ALL_BACKENDS,
        threads="equal bits",
        sums="activations",
        timed=Timed.at(8),
        gpu_sizes=(8,),
    ),
}
