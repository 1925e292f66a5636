"""Full-size calls of the block rotation, and what they launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import BF16, FP16, FP32, TOKENS, WIDTH, Call, meta


def calls() -> Iterator[Call]:
    def sized(rows: int, features: int, size: int, dtype: torch.dtype, parameters: torch.dtype, transpose: bool):
        x, blocks = meta(rows, features, dtype=dtype), meta(features // size, size, size, dtype=parameters)
        yield "block_rotate", (x, blocks, transpose)
        yield "block_rotate_backward", (x, x, blocks, transpose, True, True)

    for size in (2, 4, 8, 16, 32, 64, 128, 256):
        yield from sized(TOKENS, WIDTH, size, BF16, FP32, False)
    for size in (32, 256):
        yield from sized(TOKENS, WIDTH, size, BF16, BF16, True)
    for size in (2, 16, 32, 64, 128, 256):
        yield from sized(TOKENS, WIDTH, size, FP32, FP32, False)
    yield from sized(TOKENS, WIDTH, 32, FP16, FP32, False)
    yield from sized(TOKENS - 1, 4095, 13, BF16, FP32, False)
    yield from sized(1, WIDTH, 32, BF16, FP32, False)
    yield from sized(1, WIDTH, 256, BF16, FP32, False)
    x, weight, bias, blocks = meta(TOKENS, WIDTH, dtype=BF16), meta(WIDTH, WIDTH, dtype=BF16), None, meta(128, 32, 32)
    shared = meta(1, 32, 32)
    yield "block_rotate", (x, shared, False)
    yield "block_rotate_backward", (x, x, shared, False, True, True)
    yield "block_rotate_backward", (x, x, blocks, False, True, False)
    yield "block_rotate_backward", (x, x, blocks, False, False, True)
    yield "block_rotate_linear", (x, weight, bias, blocks)
    yield "block_rotate_linear_backward", (x, x, weight, blocks, True, True, False)


LAUNCHES = {
    "block_rotate": ["block_rotate_kernel"],
    "block_rotate_backward": ["block_rotate_backward_kernel"],
    "block_rotate_linear": ["block_rotate_kernel"],
    "block_rotate_linear_backward": ["block_rotate_backward_kernel"],
}
