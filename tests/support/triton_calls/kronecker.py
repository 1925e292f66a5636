"""Full-size calls of Kronecker products, and what they launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import BF16, FP16, FP32, TOKENS, WIDTH, Call, meta


def calls() -> Iterator[Call]:
    def sized(rows: int, sizes: tuple[int, int, int, int], dtype: torch.dtype, fused: bool = True):
        left, middle, height, width = sizes
        x, y = meta(rows, middle * width, dtype=dtype), meta(rows, left * height, dtype=dtype)
        weight, factors = meta(left * height, middle * width, dtype=dtype), (meta(left, middle), meta(height, width))
        small = factors[0], meta(height, width, dtype=dtype), 0.5
        yield "kronecker_add", (y, x, *small)
        yield "kronecker_add_backward", (y, x, *small, True, True, True)
        if fused:
            yield "kronecker_linear", (x, weight, None, *small)
            yield "kronecker_linear_backward", (y, x, weight, *small, True, True, True, True)
        yield "kronecker_weight", (weight, *factors, 0.5)
        yield "kronecker_weight_backward", (weight, *factors, 0.5, True, True)

    # A w1 of 8 x 8, of 16 x 16, and those of PEFT's default factors of 4096 and of 4096 to 11008.
    yield from sized(TOKENS, (8, 8, 512, 512), BF16)
    yield from sized(TOKENS, (16, 16, 256, 256), BF16, False)
    yield from sized(TOKENS, (64, 64, 64, 64), BF16, False)
    yield from sized(TOKENS, (86, 64, 128, 64), BF16, False)
    yield from sized(TOKENS, (8, 8, 512, 512), FP16, False)
    yield from sized(TOKENS, (8, 8, 512, 512), FP32)
    yield from sized(TOKENS, (32, 32, 128, 128), FP32, False)
    yield from sized(TOKENS - 1, (5, 7, 819, 585), BF16, False)
    yield from sized(1, (8, 8, 512, 512), BF16, False)
    x, factors = meta(TOKENS, WIDTH, dtype=BF16), (meta(8, 8), meta(512, 512, dtype=BF16), 0.5)
    yield "kronecker_add_backward", (x, x, *factors, True, False, True)
    yield "kronecker_add_backward", (x, x, *factors, False, True, False)


LAUNCHES = {
    "kronecker_add": ["kronecker_product_kernel"],
    "kronecker_add_backward": ["kronecker_product_kernel", "kronecker_factor_kernel"],
    "kronecker_linear": ["kronecker_product_kernel"],
    "kronecker_linear_backward": ["kronecker_product_kernel", "kronecker_factor_kernel"],
    "kronecker_weight": ["kronecker_weight_kernel"],
    "kronecker_weight_backward": ["kronecker_weight_backward_kernel"],
}
