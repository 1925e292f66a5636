"""Calls of butterfly products, with two and with four stages, and of the scale of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._kind import ALL_BACKENDS, Kind, Normal, Timed

if TYPE_CHECKING:
    from . import Call

STAGES = {"m2": 2, "m4": 4}


def _fits(features: int, out: int, size: int) -> bool:
    # The most stages of any variant must fit, and what they join.
    return size % 2 == 0 and size <= 32 and features % (size << 3) == 0


def _factors(call: Call, normal: Normal) -> Tensor:
    stages = STAGES[call.variant]
    return normal(stages, call.features // call.size, call.size, call.size, spread=call.size**-0.5)


def _compose(call: Call, normal: Normal) -> tuple[Any, ...]:
    factors = _factors(call, normal)
    group = call.size << (len(factors) - 1)
    return (normal(call.features // group, group, group), factors) if call.backward else (factors,)


def _multiply(call: Call, normal: Normal) -> tuple[Any, ...]:
    x, factors = normal(call.tokens, call.features, dtype=call.dtype), _factors(call, normal)
    return (
        (normal(call.tokens, call.features, dtype=call.dtype), x, factors, True, True)
        if call.backward
        else (x, factors)
    )


def _scale(call: Call, normal: Normal) -> tuple[Any, ...]:
    x, scale = normal(call.tokens, call.features, dtype=call.dtype), normal(call.features)
    rest = x, scale, normal(call.features, dtype=call.dtype), 1
    return (normal(call.tokens, call.features, dtype=call.dtype), *rest, True, True, False) if call.backward else rest


KINDS = {
    "butterfly_compose": Kind(
        *(_compose, "block", 4),
        square=True,
        tokens=False,
        dtypes=(torch.float32,),
        variants=tuple(STAGES),
        fits=_fits,
        backends=ALL_BACKENDS,
        threads="equal bits",
        sums="parameters",
        timed=Timed.at(4),
        gpu_sizes=(4,),
    ),
    "butterfly_multiply": Kind(
        _multiply,
        "block",
        4,
        square=True,
        variants=tuple(STAGES),
        fits=_fits,
        backends=ALL_BACKENDS,
        threads="equal bits",
        sums="activations",
        timed=Timed.at(4),
        gpu_sizes=(),
    ),
    # It has no size of its own: one is swept.
    "scale_channels": Kind(
        _scale,
        "block",
        4,
        square=True,
        fits=lambda features, out, size: size == 4,
        backends=ALL_BACKENDS,
        threads="equal bits",
        sums="activations",
        timed=Timed.at(4),
        gpu_sizes=(4,),
    ),
}
