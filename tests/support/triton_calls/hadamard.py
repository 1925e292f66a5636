"""Full-size calls of Hadamard products of low-rank products, and what they launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import BF16, FP16, FP32, WIDTH, Call, meta


def calls() -> Iterator[Call]:
    def factors(out: int, features: int, rank: int, dtype: torch.dtype) -> tuple:
        left, right = meta(out, rank, dtype=dtype), meta(rank, features, dtype=dtype)
        return left, right, left, right

    needs = True, True, True, True
    for rank, dtype, parameters in ((8, BF16, FP32), (32, FP32, FP32), (5, FP16, FP16)):
        four = factors(WIDTH, WIDTH, rank, parameters)
        yield "khatri_rao", (*four, dtype)
        a, b = meta(rank**2, WIDTH, dtype=dtype), meta(WIDTH, rank**2, dtype=dtype)
        yield "khatri_rao_backward", (a, b, *four, *needs)
    for rank, dtype, parameters in ((8, BF16, FP32), (32, BF16, FP32), (32, FP32, FP32)):
        four, weight = factors(WIDTH, WIDTH, rank, parameters), meta(WIDTH, WIDTH, dtype=dtype)
        yield "hadamard_weight", (weight, *four, 1.5)
        yield "hadamard_weight_backward", (weight, *four, 1.5, *needs)
    four, weight = factors(WIDTH - 1, 4095, 13, FP32), meta(WIDTH - 1, 4095, dtype=FP16)
    yield "hadamard_weight", (weight, *four, 1.5)
    yield "hadamard_weight_backward", (weight, *four, 1.5, *needs)
    yield "hadamard_weight_backward", (weight, *four, 1.5, True, False, True, False)


LAUNCHES = {
    "khatri_rao": ["khatri_rao_kernel", "khatri_rao_kernel"],
    "khatri_rao_backward": ["khatri_rao_backward_kernel", "khatri_rao_backward_kernel"],
    "hadamard_weight": ["hadamard_weight_kernel"],
    "hadamard_weight_backward": [
        "hadamard_gradient_kernel",
        "sum_kernel",
        "hadamard_gradient_kernel",
        "sum_kernel",
        "hadamard_gradient_kernel",
        "sum_kernel",
        "hadamard_gradient_kernel",
        "sum_kernel",
    ],
}

NARROW = {
    # Factors with the rank last have short rows; the gradients in the factors are nothing beside the incoming one.
    "_khatri_rao_kernel": {"load"},
    "_khatri_rao_backward_kernel": {"load", "store"},
    "_hadamard_gradient_kernel": {"store"},
}
