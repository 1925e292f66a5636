"""Block rotation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._wide import wide_product


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


def block_rotate_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    blocks: Tensor,
    need_x: bool,
    need_blocks: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, in the blocks and in the bias; an empty tensor for one not needed."""
    db = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else grad.new_empty(0)
    if not (need_x or need_blocks):
        return grad.new_empty(0), blocks.new_empty(0), db
    dx, dblocks = block_rotate_backward(grad @ weight, x, blocks, False, need_x, need_blocks)
    return dx, dblocks, db
