"""Calls of the low-rank product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._kind import ALL_BACKENDS, Kind, Normal, Timed

if TYPE_CHECKING:
    from . import Call


def _arguments(call: Call, normal: Normal) -> tuple[Any, ...]:
    tokens, features, out, rank, dtype = call.tokens, call.features, call.out, call.size, call.dtype
    x = normal(tokens, features, dtype=dtype)
    weight = bias = None
    if call.forward == "low_rank_linear":
        weight, bias = normal(out, features, spread=features**-0.5, dtype=dtype), normal(out, dtype=dtype)
    a, b = normal(rank, features, spread=features**-0.5, dtype=dtype), normal(out, rank, spread=0.1, dtype=dtype)
    factors = a, b, None, 2.0, 0.0, None
    # The base output of the forward pass and the incoming gradient of the backward pass have one shape.
    y = normal(tokens, out, dtype=dtype)
    if not call.backward:
        return (y, x, *factors) if weight is None else (x, weight, bias, *factors)
    hidden = (x.double() @ a.double().mT).to(dtype)
    if weight is None:
        return y, x, hidden, *factors, True, True, True, False
    return y, x, hidden, weight, *factors, True, True, True, False, False


KINDS = {
    "low_rank_add": Kind(
        _arguments,
        "rank",
        16,
        backends=ALL_BACKENDS,
        threads="torch's products",
        sums="activations",
        timed=Timed.at(16),
        gpu_sizes=(16, 64),
    ),
    "low_rank_linear": Kind(
        _arguments,
        "rank",
        16,
        backends=ALL_BACKENDS,
        threads="torch's products",
        sums="activations",
        timed=Timed(lambda width: (16, 64) if width == 1024 else (16,)),
        gpu_sizes=(),
    ),
}
