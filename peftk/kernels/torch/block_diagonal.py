"""Block rotation in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..shared.block_diagonal import linear_backward
from ..shared.wide import wide_product


def _by_block(x: Tensor, blocks: Tensor) -> Tensor:
    """View activations as one matrix per block: (nb, rows, b)."""
    nb, b, _ = blocks.shape
    return x.reshape(-1, nb, b).transpose(0, 1)


def block_rotate(x: Tensor, blocks: Tensor, transpose: bool) -> Tensor:
    """See `peftk.functional.block_rotate`."""
    r = blocks.to(x.dtype)
    y = torch.bmm(_by_block(x, blocks), r.mT if transpose else r)
    return y.transpose(0, 1).reshape(x.shape).contiguous()


def block_rotate_backward(
    grad: Tensor, x: Tensor, blocks: Tensor, transpose: bool, need_x: bool, need_blocks: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `block_rotate` in x and in the blocks; an empty tensor for one not needed."""
    dx = block_rotate(grad, blocks, not transpose) if need_x else grad.new_empty(0)
    if not need_blocks:
        return dx, blocks.new_empty(0)
    left, right = _by_block(x, blocks), _by_block(grad, blocks)
    if transpose:
        left, right = right, left
    return dx, wide_product(left.mT, right).to(blocks.dtype)


def block_rotate_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor:
    """See `peftk.functional.block_rotate_linear`."""
    return linear(block_rotate(x, blocks, False), weight, bias)


def _linear_backward(grad: Tensor, x: Tensor, blocks: Tensor, need_x: bool, need_blocks: bool) -> tuple[Tensor, Tensor]:
    return block_rotate_backward(grad, x, blocks, False, need_x, need_blocks)


def block_rotate_linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, in the blocks and in the bias; an empty tensor for one not needed."""
    return linear_backward(_linear_backward, *args)
