"""Full-size calls of DoRA's norms and output, and what they launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import BF16, FP16, FP32, TOKENS, WIDTH, Call, meta


def calls() -> Iterator[Call]:
    def sized(rows: int, features: int, rank: int, dtype: torch.dtype, bias: bool = True):
        x, a = meta(rows, features, dtype=dtype), meta(rank, features, dtype=dtype)
        y, b, hidden = meta(rows, WIDTH, dtype=dtype), meta(WIDTH, rank, dtype=dtype), meta(rows, rank, dtype=dtype)
        rest = a, b, meta(WIDTH), meta(WIDTH, dtype=dtype) if bias else None, 2.0
        yield "dora_norm", (meta(WIDTH, features, dtype=dtype), meta(rank, features), meta(WIDTH, rank), 2.0)
        yield "dora_compose", (y, x, *rest)
        yield "dora_compose_backward", (y, y, x, hidden, *rest, True, True, True, True, True, bias)

    # Sizes that the calls of `low_rank` have too: what both launch is compiled once.
    yield from sized(TOKENS, WIDTH, 16, BF16)
    yield from sized(TOKENS, WIDTH, 64, BF16, False)
    yield from sized(TOKENS, WIDTH, 16, FP32)
    for dtype in (BF16, FP32):
        yield "dora_norm", (meta(WIDTH, WIDTH, dtype=dtype).mT, meta(16, WIDTH), meta(WIDTH, 16), 2.0)
    yield "dora_norm", (meta(WIDTH - 1, 4095, dtype=FP16), meta(7, 4095), meta(WIDTH - 1, 7), 2.0)


LAUNCHES = {
    "dora_norm": ["dora_norm_kernel"],
    "dora_compose": ["shrink_kernel", "dora_compose_kernel"],
    "dora_compose_backward": [
        "scale_channels_backward_kernel",
        "backward_kernel",
        "hidden_gradient_kernel",
        "expand_kernel",
        "sum_kernel",
        "factor_gradient_kernel",
        "sum_kernel",
    ],
}

NARROW = {
    # One sum for every row.
    "_dora_norm_kernel": {"store"},
}
