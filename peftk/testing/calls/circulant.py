"""Calls of the circular convolution and of the circulant weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._kind import ALL_BACKENDS, Kind, Normal, Timed

if TYPE_CHECKING:
    from . import Call


def _fits(features: int, out: int, size: int) -> bool:
    return features % size == 0 and out % size == 0


def _kernel(call: Call, normal: Normal) -> Tensor:
    return normal(call.out // call.size, call.features // call.size, call.size, spread=call.features**-0.5)


def _conv(call: Call, normal: Normal) -> tuple[Any, ...]:
    x, kernel = normal(call.tokens, call.features, dtype=call.dtype), _kernel(call, normal)
    y = normal(call.tokens, call.out, dtype=call.dtype)
    if call.backward:
        return y, x, kernel, 1.0, True, True
    return (y, x, kernel, 1.0) if call.forward == "circular_conv_add" else (x, kernel, 1.0)


def _linear(call: Call, normal: Normal) -> tuple[Any, ...]:
    x, kernel = normal(call.tokens, call.features, dtype=call.dtype), _kernel(call, normal)
    weight = normal(call.out, call.features, spread=call.features**-0.5, dtype=call.dtype)
    if call.backward:
        return normal(call.tokens, call.out, dtype=call.dtype), x, weight, kernel, 1.0, True, True, False
    return x, weight, normal(call.out, dtype=call.dtype), kernel, 1.0


def _weight(call: Call, normal: Normal) -> tuple[Any, ...]:
    return normal(call.out, call.features, dtype=call.dtype), _kernel(call, normal), 1.0


KINDS = {
    "circular_conv": Kind(
        _conv,
        "block",
        32,
        fits=_fits,
        backends=ALL_BACKENDS,
        threads="torch's products",
        sums="activations",
        timed=Timed(lambda width: (32,), widths=(1024,)),
        gpu_sizes=(),
    ),
    "circular_conv_add": Kind(
        _conv,
        "block",
        32,
        fits=_fits,
        backends=ALL_BACKENDS,
        threads="torch's products",
        sums="activations",
        timed=Timed(lambda width: (width // 8, 32)),
        gpu_sizes=(128,),
    ),
    "circulant_linear": Kind(
        _linear,
        "block",
        32,
        fits=_fits,
        backends=ALL_BACKENDS,
        threads="torch's products",
        sums="activations",
        timed=Timed(lambda width: (width // 8,)),
        gpu_sizes=(),
    ),
    "circulant_weight": Kind(
        _weight,
        "block",
        32,
        tokens=False,
        fits=_fits,
        backends=ALL_BACKENDS,
        threads="equal bits",
        sums="activations",
        timed=Timed(lambda width: (width // 8, 32)),
        gpu_sizes=(128,),
    ),
}
