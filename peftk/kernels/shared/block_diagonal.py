"""The gradients of a rotated linear layer, made of a backend's own gradients of the rotation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def linear_backward(
    rotate_backward: Callable[[Tensor, Tensor, Tensor, bool, bool], tuple[Tensor, Tensor]],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    blocks: Tensor,
    need_x: bool,
    need_blocks: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, in the blocks and in the bias; an empty tensor for one not needed.

    `rotate_backward` has the product of the gradient and the weight to itself, and may write over it.
    """
    dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else grad.new_empty(0)
    if not (need_x or need_blocks):
        return grad.new_empty(0), blocks.new_empty(0), dbias
    return *rotate_backward(grad @ weight, x, blocks, need_x, need_blocks), dbias
