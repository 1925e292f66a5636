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


PLAIN = {"grouped_low_rank_add": grouped_low_rank_add}
