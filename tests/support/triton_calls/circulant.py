"""Full-size calls of circular convolutions, and what they launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from . import BF16, FP16, FP32, TOKENS, WIDTH, Call, meta


def calls() -> Iterator[Call]:
    def sized(rows: int, features: int, out: int, size: int, dtype: torch.dtype):
        x, y, weight = meta(rows, features, dtype=dtype), meta(rows, out, dtype=dtype), meta(out, features, dtype=dtype)
        kernel = meta(out // size, features // size, size)
        yield "circular_conv", (x, kernel, 1.0)
        yield "circular_conv_backward", (y, x, kernel, 1.0, True, True)
        yield "circular_conv_add", (y, x, kernel, 1.0)
        yield "circular_conv_add_backward", (y, x, kernel, 1.0, True, True)
        yield "circulant_linear", (x, weight, None, kernel, 1.0)
        yield "circulant_linear_backward", (y, x, weight, kernel, 1.0, True, True, False)
        yield "circulant_weight", (weight, kernel, 1.0)
        yield "circulant_weight_backward", (weight, kernel, 1.0)

    yield from sized(TOKENS, WIDTH, WIDTH, 128, BF16)
    yield from sized(TOKENS, WIDTH, WIDTH, 128, FP32)
    # Small blocks, where the dense way is taken; one row; few blocks; and sizes that no power of two divides.
    yield from (
        *itertools.islice(sized(TOKENS, WIDTH, WIDTH, 8, BF16), 2),
        *itertools.islice(sized(1, WIDTH, WIDTH, 128, BF16), 1),
        *itertools.islice(sized(TOKENS, WIDTH, WIDTH, 1024, FP16), 2),
        *sized(TOKENS - 1, 45 * 91, 3 * 91, 91, BF16),
    )


LAUNCHES = {
    "circular_conv": ["circulant_mix_kernel"],
    "circular_conv_add": ["circulant_mix_kernel"],
    "circular_conv_backward": ["circulant_mix_kernel", "circulant_contract_kernel"],
    "circular_conv_add_backward": ["circulant_mix_kernel", "circulant_contract_kernel"],
    "circulant_linear": ["circulant_mix_kernel"],
    "circulant_linear_backward": ["circulant_mix_kernel", "circulant_contract_kernel"],
    "circulant_weight": ["circulant_weight_kernel"],
    "circulant_weight_backward": ["circulant_weight_backward_kernel"],
}

NARROW = {
    # A row's tile has few elements for each thread; rolled rows and diagonals of circulant blocks start anywhere.
    "_circulant_mix_kernel": {"load"},
    "_circulant_contract_kernel": {"load"},
    "_circulant_weight_kernel": {"load"},
    "_circulant_weight_backward_kernel": {"load", "store"},
}
