"""Calls of DoRA's norms and of its output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._kind import ALL_BACKENDS, Kind, Normal, Timed

if TYPE_CHECKING:
    from . import Call


def _norm(call: Call, normal: Normal) -> tuple[Any, ...]:
    weight = normal(call.out, call.features, spread=call.features**-0.5, dtype=call.dtype)
    # Parameters stay float32.
    return weight, normal(call.size, call.features), normal(call.out, call.size, spread=0.01), 2.0


def _compose(call: Call, normal: Normal) -> tuple[Any, ...]:
    tokens, features, out, dtype = call.tokens, call.features, call.out, call.dtype
    base, x = normal(tokens, out, dtype=dtype), normal(tokens, features, dtype=dtype)
    a = normal(call.size, features, spread=features**-0.5, dtype=dtype)
    b = normal(out, call.size, spread=0.1, dtype=dtype)
    factors = a, b, 1 + normal(out, spread=0.1), normal(out, dtype=dtype), 2.0
    if not call.backward:
        return base, x, *factors
    hidden = (x.double() @ a.double().mT).to(dtype)
    return normal(tokens, out, dtype=dtype), base, x, hidden, *factors, True, True, True, True, True, False


KINDS = {
    "dora_compose": Kind(
        _compose,
        "rank",
        16,
        backends=ALL_BACKENDS,
        threads="torch's products",
        sums="activations",
        timed=Timed.at(16),
        gpu_sizes=(16,),
    ),
    "dora_norm": Kind(
        _norm,
        "rank",
        16,
        tokens=False,
        differentiable=False,
        backends=ALL_BACKENDS,
        threads="equal bits",
        sums="float32",
        timed=Timed.at(16),
        gpu_sizes=(16,),
    ),
}
