"""Trials of the circular convolution and of the circulant weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._trial import FEATURES, OUT, SIZE, TOKENS, Trial


def _dense(kernel: Tensor) -> Tensor:
    # A product with the identity, one diagonal at a time: kernel[..., l] lies at all q = p + l.
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    blocks = sum(kernel[..., i, None, None] * eye.roll(i, 1) for i in range(kernel.shape[-1]))
    return blocks.transpose(1, 2).flatten(0, 1).flatten(1)


def trials(normal: Callable[..., Tensor]) -> list[Trial]:
    """Return the trials of this family."""
    x, weight, bias = normal(TOKENS, FEATURES), normal(OUT, FEATURES, spread=FEATURES**-0.5), normal(OUT)
    base, kernel = normal(TOKENS, OUT), normal(OUT // SIZE, FEATURES // SIZE, SIZE, spread=FEATURES**-0.5)
    scale = {"scale": 0.5}
    return [
        Trial(
            "circular_conv",
            "",
            {"x": x, "kernel": kernel},
            scale,
            lambda x, kernel: 0.5 * x @ _dense(kernel).mT,
        ),
        Trial(
            "circular_conv_add",
            "",
            {"base": base, "x": x, "kernel": kernel},
            scale,
            lambda base, x, kernel: base + 0.5 * x @ _dense(kernel).mT,
        ),
        Trial(
            "circulant_linear",
            "",
            {"x": x, "weight": weight, "bias": bias, "kernel": kernel},
            scale,
            lambda x, weight, bias, kernel: x @ (weight + 0.5 * _dense(kernel)).mT + bias,
        ),
        Trial(
            "circulant_weight",
            "",
            {"weight": weight, "kernel": kernel},
            scale,
            lambda weight, kernel: weight + 0.5 * _dense(kernel),
        ),
    ]
