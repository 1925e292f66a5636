"""Calls of the Kronecker product, the size being that of a square first factor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._kind import ALL_BACKENDS, Kind, Normal, Timed

if TYPE_CHECKING:
    from . import Call


def _fits(features: int, out: int, size: int) -> bool:
    return features % size == 0 and out % size == 0


def _factors(call: Call, normal: Normal, **kwargs: Any) -> tuple[Any, ...]:
    rows, columns = call.out // call.size, call.features // call.size
    return normal(call.size, call.size, spread=call.size**-0.5), normal(rows, columns, spread=columns**-0.5, **kwargs)


def _weight_of(call: Call, normal: Normal) -> Tensor:
    return normal(call.out, call.features, spread=call.features**-0.5, dtype=call.dtype)


def _add(call: Call, normal: Normal) -> tuple[Any, ...]:
    x, factors = normal(call.tokens, call.features, dtype=call.dtype), _factors(call, normal, dtype=call.dtype)
    # The base output of the forward pass and the incoming gradient of the backward pass have one shape.
    y = normal(call.tokens, call.out, dtype=call.dtype)
    return (y, x, *factors, 0.5, True, True, True) if call.backward else (y, x, *factors, 0.5)


def _linear(call: Call, normal: Normal) -> tuple[Any, ...]:
    x, factors = normal(call.tokens, call.features, dtype=call.dtype), _factors(call, normal, dtype=call.dtype)
    weight = _weight_of(call, normal)
    y = normal(call.tokens if call.backward else 1, call.out, dtype=call.dtype)
    if call.backward:
        return y, x, weight, *factors, 0.5, True, True, True, False
    return x, weight, y[0], *factors, 0.5


def _weight(call: Call, normal: Normal) -> tuple[Any, ...]:
    needs = (True, True) if call.backward else ()
    return _weight_of(call, normal), *_factors(call, normal), 0.5, *needs


KINDS = {
    "kronecker_add": Kind(
        _add,
        "factor",
        8,
        fits=_fits,
        backends=ALL_BACKENDS,
        threads="torch's products",
        sums="activations",
        timed=Timed.at(8),
        gpu_sizes=(8,),
    ),
    "kronecker_linear": Kind(
        _linear,
        "factor",
        8,
        fits=_fits,
        backends=ALL_BACKENDS,
        threads="torch's products",
        sums="activations",
        timed=Timed.at(8),
        gpu_sizes=(),
    ),
    "kronecker_weight": Kind(
        _weight,
        "factor",
        8,
        tokens=False,
        fits=_fits,
        backends=ALL_BACKENDS,
        threads="equal bits",
        sums="activations",
        timed=Timed.at(8),
        gpu_sizes=(8,),
    ),
}
