"""What the low-rank operators cost, from the shapes of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _hidden(x: Tensor, a: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], a.shape[0])


def _low_rank_flops(x: torch.Size, a: torch.Size, b: torch.Size) -> int:
    return 2 * (x.numel() // max(x[-1], 1)) * a[0] * (a[1] + b[0])


def _add_flops(_base: object, x: torch.Size, a: torch.Size, b: torch.Size, *_args: object, **_kw: object) -> int:
    return _low_rank_flops(x, a, b)


def _linear_flops(
    x: torch.Size, weight: torch.Size, _bias: object, a: torch.Size, b: torch.Size, *_args: object, **_kw: object
) -> int:
    return 2 * x.numel() * weight[0] + _low_rank_flops(x, a, b)


def _add_backward_flops(
    grad: torch.Size, x: torch.Size, _hidden: object, a: torch.Size, b: torch.Size, *_args: object, **_kw: object
) -> int:
    return 2 * _low_rank_flops(x, a, b)


def _linear_backward_flops(
    grad: torch.Size,
    x: torch.Size,
    _hidden: object,
    weight: torch.Size,
    a: torch.Size,
    b: torch.Size,
    *_args: object,
    **_kw: object,
) -> int:
    return 2 * grad.numel() * weight[1] + 2 * _low_rank_flops(x, a, b)
