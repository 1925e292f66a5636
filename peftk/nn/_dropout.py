"""Dropout that keeps a seed for the backward pass, not a mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as tf

from ..ops._autograd import apply


class _Dropped(torch.autograd.Function):
    """Zeroes elements of x; which ones depends on the seed alone."""

    @staticmethod
    def forward(x: Tensor, p: float, seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
        return torch.where(keep, x / (1 - p), 0.0)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _x, ctx.p, ctx.seed = inputs

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return _Dropped.forward(grad, ctx.p, ctx.seed), None, None


def dropped(x: Tensor, p: float) -> Tensor:
    """Drop elements of x with probability p; the seed comes from the CPU's default generator."""
    if p == 0:
        return x
    if torch.compiler.is_compiling():
        # A compiler regenerates its random numbers itself.
        return tf.dropout(x, p)
    return apply(_Dropped, x, p, int(torch.randint(2**63 - 1, ())))
