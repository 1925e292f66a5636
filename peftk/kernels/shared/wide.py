"""Products of half-precision matrices whose sums are not rounded to half precision: gradients of parameters."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over tokens: float32 for half precision, and else the same."""
    return torch.float32 if dtype in HALF else dtype


def widened(x: Tensor) -> Tensor:
    """Return x in the dtype of its sums."""
    return x.float() if x.dtype in HALF else x


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of two matrices, or of two batches of them, in `wide` of their dtype.

    GPUs sum in float32 anyway and are asked for what they summed; on a CPU both are widened first.
    """
    product = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype in HALF and a.is_cuda and a.dtype is b.dtype:
        return product(a, b, out_dtype=torch.float32)
    return product(widened(a), widened(b))
