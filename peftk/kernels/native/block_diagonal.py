"""Block rotation in C++ on the CPU and in CUDA; the product with the frozen weight stays in torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ... import _C  # noqa: F401 - importing it registers the operators of peftk_native
from ..shared.block_diagonal import linear_backward
from ._supports import ACTIVATIONS, device_reason, supports_activations

# Looked up once: the look-up of an operator by name costs as much as a small kernel.
_rotate = torch.ops.peftk_native.block_rotate.default
_rotate_backward = torch.ops.peftk_native.block_rotate_backward.default

CPU_SIZE = 256
"""Largest block of the C++ kernels: above, torch's products are faster."""

CUDA_SIZES = range(2, 17)
"""Block sizes of the CUDA kernels: above, matrix instructions are faster, and Triton has them."""


def _matrices(blocks: Tensor) -> Tensor:
    return blocks.float().contiguous()


def block_rotate_supports(x: Tensor, blocks: Tensor | SimpleNamespace, *args: object) -> str | None:
    """Return None, or why C++ cannot rotate x."""
    if not x.is_cuda:
        if x.is_cpu and x.dtype in ACTIVATIONS and blocks.shape[-1] <= CPU_SIZE:
            return None
        if blocks.shape[-1] > CPU_SIZE:
            return f"the C++ kernels take blocks of at most {CPU_SIZE}; got {blocks.shape[-1]}"
        return supports_activations(x)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the CUDA kernels take float32, bfloat16 and float16; got {x.dtype}"
    if blocks.shape[-1] not in CUDA_SIZES:
        return f"the CUDA kernels take blocks of {CUDA_SIZES[0]} to {CUDA_SIZES[-1]}; got {blocks.shape[-1]}"
    return device_reason(x)


def block_rotate(x: Tensor, blocks: Tensor, transpose: bool) -> Tensor:
    """See `peftk.functional.block_rotate`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if blocks.dtype is not torch.float32 or not blocks.is_contiguous():
        blocks = _matrices(blocks)
    _rotate(x, blocks, transpose, out)
    return out


def _backward(grad: Tensor, x: Tensor, blocks: Tensor, transpose: bool, dx: Tensor, need_blocks: bool) -> Tensor:
    matrices = _matrices(blocks)
    dblocks = torch.empty(matrices.shape if need_blocks else 0, dtype=torch.float32, device=grad.device)
    _rotate_backward(grad, x.contiguous(), matrices, transpose, dx, dblocks)
    return dblocks.to(blocks.dtype)


def block_rotate_backward_supports(grad: Tensor, x: Tensor, blocks: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    return block_rotate_supports(grad, blocks)


def block_rotate_backward(
    grad: Tensor, x: Tensor, blocks: Tensor, transpose: bool, need_x: bool, need_blocks: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `block_rotate` in x and in the blocks; an empty tensor for one not needed."""
    dx = torch.empty(grad.shape if need_x else 0, dtype=grad.dtype, device=grad.device)
    return dx, _backward(grad.contiguous(), x, blocks, transpose, dx, need_blocks)


def block_rotate_linear_supports(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> str | None:
    """Return None, or why C++ cannot rotate x."""
    return block_rotate_supports(x, blocks)


def block_rotate_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor:
    """See `peftk.functional.block_rotate_linear`."""
    return linear(block_rotate(x, blocks, False), weight, bias)


def block_rotate_linear_backward_supports(
    grad: Tensor, x: Tensor, weight: Tensor, blocks: Tensor, *args: object
) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    return block_rotate_supports(grad, blocks)


def _linear_backward(
    product: Tensor, x: Tensor, blocks: Tensor, need_x: bool, need_blocks: bool
) -> tuple[Tensor, Tensor]:
    # The gradient of x takes the place of the product: one full-size buffer less.
    dx = product if need_x else product.new_empty(0)
    return dx, _backward(product, x, blocks, False, dx, need_blocks)


def block_rotate_linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, in the blocks and in the bias; an empty tensor for one not needed."""
    return linear_backward(_linear_backward, *args)
