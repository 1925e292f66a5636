"""Calls of the grouped low-rank product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ._kind import ALL_BACKENDS, Kind, Normal, Timed

if TYPE_CHECKING:
    from . import Call

GROUPS = 16


def _ends(tokens: int, uneven: bool) -> list[int]:
    """Return where each group ends: of equal sizes, or every one twice as large as the next."""
    if not uneven:
        return [tokens * (g + 1) // GROUPS for g in range(GROUPS)]
    return [tokens - tokens // 2 ** (g + 1) for g in range(GROUPS - 1)] + [tokens]


def _arguments(call: Call, normal: Normal) -> tuple[Any, ...]:
    tokens, features, out, rank, dtype = call.tokens, call.features, call.out, call.size, call.dtype
    x = normal(tokens, features, dtype=dtype)
    a = normal(GROUPS, rank, features, spread=features**-0.5, dtype=dtype)
    b = normal(GROUPS, out, rank, spread=0.1, dtype=dtype)
    ends = _ends(tokens, call.variant == "uneven")
    offsets = torch.tensor(ends, device=x.device)
    # The base output of the forward pass and the incoming gradient of the backward pass have one shape.
    y = normal(tokens, out, dtype=dtype)
    fused = call.forward == "grouped_low_rank_linear"
    weight = (normal(GROUPS, out, features, spread=features**-0.5, dtype=dtype),) if fused else ()
    if not call.backward:
        return *((x, *weight) if fused else (y, x)), a, b, offsets, None, 2.0
    hidden = x.new_empty(tokens, rank)
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        hidden[start:end] = x[start:end] @ a[group].mT
    return y, x, hidden, *weight, a, b, offsets, None, 2.0, True, True, True, False


KINDS = {
    "grouped_low_rank_add": Kind(
        _arguments,
        "rank",
        16,
        backends=ALL_BACKENDS,
        threads="equal bits",
        sums="activations",
        timed=Timed.at(16),
        gpu_sizes=(16,),
        variants=("even", "uneven"),
    ),
    "grouped_low_rank_linear": Kind(
        _arguments,
        "rank",
        16,
        backends=ALL_BACKENDS,
        threads="torch's products",
        sums="activations",
        timed=Timed.at(16),
        gpu_sizes=(16,),
        variants=("even", "uneven"),
    ),
}
