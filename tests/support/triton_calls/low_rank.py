"""Full-size calls of the low-rank product, and what they launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import BF16, FP16, FP32, TOKENS, WIDTH, Call, meta


def calls() -> Iterator[Call]:
    def sized(rows: int, features: int, rank: int, dtype: torch.dtype, gate: str | None = None, p: float = 0.0):
        x, a = meta(rows, features, dtype=dtype), meta(rank, features, dtype=dtype)
        y, b, hidden = meta(rows, WIDTH, dtype=dtype), meta(WIDTH, rank, dtype=dtype), meta(rows, rank, dtype=dtype)
        weight, bias = meta(WIDTH, features, dtype=dtype), meta(WIDTH, dtype=dtype)
        gates = {None: None, "rank": meta(rank), "token": meta(rows, rank)}
        factors = a, b, gates[gate], 2.0, p, torch.tensor(1234) if p else None
        needs = True, True, True, gate is not None
        yield "low_rank_add", (y, x, *factors)
        yield "low_rank_add_backward", (y, x, hidden, *factors, *needs)
        yield "low_rank_linear", (x, weight, bias, *factors)
        yield "low_rank_linear_backward", (y, x, hidden, weight, *factors, *needs, True)

    for rank in (1, 8, 16, 64, 128, 256):
        yield from sized(TOKENS, WIDTH, rank, BF16)
    yield from sized(TOKENS, WIDTH, 16, BF16, None, 0.1)
    yield from sized(TOKENS, WIDTH, 16, BF16, "rank", 0.0)
    yield from sized(TOKENS, WIDTH, 16, BF16, "token", 0.1)
    yield from sized(TOKENS, WIDTH, 16, FP16)
    yield from sized(TOKENS, WIDTH, 16, FP32)
    yield from sized(TOKENS, WIDTH, 64, FP32, "rank", 0.1)
    yield from sized(TOKENS - 1, 4095, 7, BF16, "rank", 0.1)
    yield from sized(1, WIDTH, 16, BF16)


LAUNCHES = {
    "low_rank_add": ["shrink_kernel", "expand_kernel"],
    "low_rank_add_backward": [
        "backward_kernel",
        "hidden_gradient_kernel",
        "expand_kernel",
        "sum_kernel",
        "factor_gradient_kernel",
        "sum_kernel",
    ],
    "low_rank_linear": ["shrink_kernel", "expand_kernel"],
    "low_rank_linear_backward": [
        "backward_kernel",
        "hidden_gradient_kernel",
        "expand_kernel",
        "sum_kernel",
        "factor_gradient_kernel",
        "sum_kernel",
    ],
}

ONLY = {"_linear_kernel": ("sm_90", "sm_100")}
