"""The low-rank product for few rows that record nothing, as generating a token at a time does: without ceremony.

An operator's way through checks, autograd and the choice of a backend takes longer than a row's own arithmetic. Here
the base product is torch's own, and what is added costs a call or two, with sums and factors in float32 whatever the
dtype of the activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..runtime import registry
from .plain import unobserved

FEW = 63
"""Rows up to which this is the faster way; beyond, the operators gain more than they cost."""

_DTYPES = (torch.float32, torch.bfloat16)

_ORDINARY = (Tensor, nn.Parameter)


def few(x: Tensor, features: int) -> bool:
    """Whether x has so few rows of so many features that this way is the faster one, in a dtype that it has."""
    return x.is_cpu and 0 < x.numel() <= FEW * features and x.dtype in _DTYPES


def low_rank_few(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Any, gate: Tensor | None
) -> Tensor | None:
    """Return ``linear(x, weight, bias) + scale * (x @ a.T * gate) @ b.T``, or None where the operators have to run.

    Args:
        x: (..., in), in the dtype of the weight; no gradient is recorded.
        weight: (out, in).
        bias: (out,) or None.
        a: (rank, in).
        b: (out, rank).
        scale: A number; operators take a tensor.
        gate: (rank,) or None.
    """
    features = x.shape[-1]
    if (
        not few(x, features)
        or type(scale) is not float
        or type(x) not in _ORDINARY
        or not (a.dtype is b.dtype is torch.float32)
        or (gate is not None and (gate.dtype is not torch.float32 or gate.dim() != 1))
        or a.shape[0] == 0
        or a.shape[1] != features
        or b.shape[0] != weight.shape[0]
        or not (x.is_contiguous() and a.is_contiguous() and b.is_contiguous())
        or not unobserved()
    ):
        return None
    module = registry.backend_module("native", "low_rank")
    if isinstance(module, str):
        return None
    y = linear(x, weight, bias)
    module.few_(y, x, a, b, gate, scale)
    return y
