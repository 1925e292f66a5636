"""Full-size calls of the grouped low-rank product, and what they launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import BF16, FP16, FP32, TOKENS, WIDTH, Call, meta


def calls() -> Iterator[Call]:
    def sized(
        rows: int,
        features: int,
        rank: int,
        groups: int,
        dtype: torch.dtype,
        gated: bool = False,
        indices: torch.dtype = torch.int64,
        fused: bool = False,
    ):
        x, y, hidden = (meta(rows, columns, dtype=dtype) for columns in (features, WIDTH, rank))
        a, b = meta(groups, rank, features, dtype=dtype), meta(groups, WIDTH, rank, dtype=dtype)
        gate = meta(rows, rank) if gated else None
        parameters = a, b, meta(groups, dtype=indices), gate, 2.0
        yield "grouped_low_rank_add", (y, x, *parameters)
        yield "grouped_low_rank_add_backward", (y, x, hidden, *parameters, True, True, True, gated)
        if not fused:
            return
        weight = meta(groups, WIDTH, features, dtype=dtype)
        yield "grouped_low_rank_linear", (x, weight, *parameters)
        yield "grouped_low_rank_linear_backward", (y, x, hidden, weight, *parameters, True, True, True, gated)

    for rank in (1, 8, 16, 64, 128):
        yield from sized(TOKENS, WIDTH, rank, 128, BF16)
    yield from sized(TOKENS, WIDTH, 16, 4, BF16, indices=torch.int32)
    yield from sized(TOKENS, WIDTH, 16, 1000, BF16)
    yield from sized(TOKENS, WIDTH, 16, 128, BF16, gated=True)
    # Beside frozen weights the kernels are the same.
    yield from sized(TOKENS, WIDTH, 16, 128, FP16, fused=True)
    yield from sized(TOKENS, WIDTH, 16, 128, FP32, fused=True)
    yield from sized(TOKENS, WIDTH, 64, 128, FP32, gated=True)
    yield from sized(TOKENS - 1, 4095, 7, 60, BF16, gated=True)
    yield from sized(1, WIDTH, 16, 8, BF16)


_FORWARD = ["grouped_shrink_kernel", "grouped_expand_kernel"]
_BACKWARD = [
    "grouped_factor_kernel",
    "grouped_sum_kernel",
    "grouped_shrink_kernel",
    "hidden_gradient_kernel",
    "grouped_expand_kernel",
    "grouped_factor_kernel",
    "grouped_sum_kernel",
]
# The product with the frozen weights is torch's.
LAUNCHES = {
    "grouped_low_rank_add": _FORWARD,
    "grouped_low_rank_add_backward": _BACKWARD,
    "grouped_low_rank_linear": _FORWARD,
    "grouped_low_rank_linear_backward": _BACKWARD,
}
