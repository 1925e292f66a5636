"""Butterfly products and the scale of channels in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_diagonal import rotate


def multiply(x: Tensor, factors: Tensor) -> Tensor:
    """Rotate by one stage after the other, the last one first."""
    half = factors.shape[-1] // 2
    for stage in range(len(factors) - 1, -1, -1):
        # Of every chunk of 2^(stage + 1) half blocks, the first half meets the second: they are interleaved.
        halves = x.view(len(x), -1, 2, 2**stage, half).transpose(2, 3)
        x = rotate(halves.reshape(x.shape), factors[stage])
        x = x.view(len(x), -1, 2**stage, 2, half).transpose(2, 3).reshape(x.shape)
    return x


def compose(factors: Tensor) -> Tensor:
    """Let every group of features that the stages join rotate an identity of its own, all of them at once."""
    stages, count, size, _ = factors.shape
    group = size << (stages - 1)
    eye = torch.eye(group, dtype=factors.dtype, device=factors.device)
    return multiply(eye.repeat(1, count * size // group), factors).view(group, -1, group).transpose(0, 1)


PLAIN = {
    "butterfly_compose": compose,
    "butterfly_multiply": multiply,
    "scale_channels": lambda x, scale, bias: bias + scale * (x - bias),
}
