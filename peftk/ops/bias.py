"""A bias of an adapter on an output that may be of half precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.shared.wide import HALF, wide
from ..runtime import registry
from ._autograd import transformed


def add_bias(result: Tensor, bias: Tensor, dim: int = -1) -> Tensor:
    """Return ``result + bias`` in the dtype of the result; the gradient of the bias is summed in float32 at least.

    Args:
        result: Any shape, with the channels at `dim`.
        bias: (channels,), any floating dtype.
        dim: Counted from the end.
    """
    if transformed() or result.dtype not in HALF:
        return result + _along(bias.to(result.dtype), dim)
    return registry.apply(_AddBias, result, bias, dim)


def _along(bias: Tensor, dim: int) -> Tensor:
    return bias.view(-1, *[1] * (-dim - 1))


class _AddBias(torch.autograd.Function):
    """Rounds the bias to the dtype of the output, and not its gradient."""

    @staticmethod
    def forward(result: Tensor, bias: Tensor, dim: int) -> Tensor:
        return result + _along(bias.to(result.dtype), dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _result, _bias, ctx.dim = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        need_result, need_bias, _ = ctx.needs_input_grad
        others = [d for d in range(grad.dim()) if d != grad.dim() + ctx.dim]
        dbias = grad.sum(others, dtype=wide(grad.dtype)) if need_bias else None
        return grad if need_result else None, dbias, None
