"""The grouped low-rank product in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def grouped_low_rank_add(base: Tensor, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, scale: float = 1.0) -> Tensor:
    """Add the product of each group's rows with the factors of the group, one group after the other."""
    found, start = [], 0
    for group, end in enumerate(offsets.tolist()):
        rows = slice(start, end)
        found.append(base[rows] + scale * linear(linear(x[rows], a[group]), b[group]))
        start = end
    return torch.cat([*found, base[start:]])


def grouped_low_rank_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor, scale: float = 1.0
) -> Tensor:
    """Multiply each group's rows by its weight and its factors, one group after the other."""
    found, start = [], 0
    for group, end in enumerate(offsets.tolist()):
        rows = x[start:end]
        found.append(linear(rows, weight[group]) + scale * linear(linear(rows, a[group]), b[group]))
        start = end
    return torch.cat([*found, x.new_zeros(len(x) - start, weight.shape[1])])


PLAIN = {"grouped_low_rank_add": grouped_low_rank_add, "grouped_low_rank_linear": grouped_low_rank_linear}
