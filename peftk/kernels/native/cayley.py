"""The Cayley transform in C++ on the CPU, and the exact one in CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C  # noqa: F401 - importing it registers the operators of peftk_native
from ._supports import device_reason

# Looked up once: the look-up of an operator by name costs as much as a small kernel.
_cayley = torch.ops.peftk_native.cayley.default
_cayley_backward = torch.ops.peftk_native.cayley_backward.default

EXACT_SIZE = 64
"""Largest block that the exact transform inverts in C++ and CUDA; LAPACK is faster above."""


def _supports(skew: Tensor, block_size: int, polynomial: list[float]) -> str | None:
    if skew.dtype is not torch.float32:
        return f"the C++ kernels take float32 matrices; got {skew.dtype}"
    if not polynomial and block_size > EXACT_SIZE:
        return f"the exact transform takes blocks up to {EXACT_SIZE} in C++; got {block_size}"
    if polynomial and skew.is_cuda:
        return "the CUDA kernels have the exact transform only; got a Neumann series"
    return device_reason(skew)


def cayley_supports(skew: Tensor, block_size: int, polynomial: list[float]) -> str | None:
    """Return None, or why C++ cannot transform these blocks."""
    if skew.is_cpu and skew.dtype is torch.float32 and block_size <= EXACT_SIZE:
        return None
    return _supports(skew, block_size, polynomial)


def cayley(skew: Tensor, block_size: int, polynomial: list[float]) -> Tensor:
    """See `peftk.functional.cayley`."""
    out = skew.new_empty(skew.shape[0], block_size, block_size)
    _cayley(skew.contiguous(), block_size, polynomial, out)
    return out


def cayley_backward_supports(grad: Tensor, skew: Tensor, blocks: Tensor, polynomial: list[float]) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    if skew.is_cpu and skew.dtype is torch.float32 and blocks.shape[-1] <= EXACT_SIZE:
        return None
    return _supports(skew, blocks.shape[-1], polynomial)


def cayley_backward(grad: Tensor, skew: Tensor, blocks: Tensor, polynomial: list[float]) -> Tensor:
    """Return the gradient of `cayley` in the skew-symmetric matrices, as they are given."""
    skew = skew.contiguous()
    out = torch.empty_like(skew)
    _cayley_backward(grad.contiguous(), skew, blocks, polynomial, out)
    return out
