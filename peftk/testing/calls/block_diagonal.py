"""Calls of the block rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ._kind import ALL_BACKENDS, Kind, Normal, Timed

if TYPE_CHECKING:
    from . import Call


def _fits(features: int, out: int, size: int) -> bool:
    return features % size == 0


def _rotate(call: Call, normal: Normal) -> tuple[Any, ...]:
    x = normal(call.tokens, call.features, dtype=call.dtype)
    blocks = normal(call.features // call.size, call.size, call.size, spread=call.size**-0.5)
    if call.backward:
        return normal(call.tokens, call.features, dtype=call.dtype), x, blocks, False, True, True
    return x, blocks, False


def _rotate_linear(call: Call, normal: Normal) -> tuple[Any, ...]:
    x = normal(call.tokens, call.features, dtype=call.dtype)
    weight = normal(call.out, call.features, spread=call.features**-0.5, dtype=call.dtype)
    bias = normal(call.out, dtype=call.dtype)
    blocks = normal(call.features // call.size, call.size, call.size, spread=call.size**-0.5)
    if call.backward:
        return normal(call.tokens, call.out, dtype=call.dtype), x, weight, blocks, True, True, False
    return x, weight, bias, blocks


KINDS = {
    "block_rotate": Kind(
        _rotate,
        "block",
        32,
        square=True,
        fits=_fits,
        backends=ALL_BACKENDS,
        threads="equal bits",
        sums="activations",
        timed=Timed.at(32, 8, 256, dtypes=(torch.float32, torch.bfloat16)),
        gpu_sizes=(8, 32, 64, 256),
    ),
    "block_rotate_linear": Kind(
        _rotate_linear,
        "block",
        32,
        fits=_fits,
        backends=ALL_BACKENDS,
        threads="torch's products",
        sums="activations",
        timed=Timed.at(32),
        gpu_sizes=(),
    ),
}
