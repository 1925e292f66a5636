"""Factors with more rows than their rank: zeros, which change no output, so that shapes stay when adapters change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SIZES = ("in_features", "out_features", "in_channels", "out_channels")


def resized(factor: Tensor, which: int, groups: int, rank: int) -> Tensor:
    """Return A (`which` 0: (rank, ...)) or B (1: (out, rank / groups, ...)) with another rank.

    Zeros are added, or rows left out, at the end; of a convolution with groups at the end of every group, because B
    reads the rows of A group by group.
    """
    blocks = factor.unflatten(0, (groups, factor.shape[0] // groups)) if which == 0 else factor
    size, have = rank // groups, blocks.shape[1]
    if have == size:
        return factor
    if have > size:
        blocks = blocks.narrow(1, 0, size)
    else:
        more = blocks.new_zeros(blocks.shape[0], size - have, *blocks.shape[2:])
        blocks = torch.cat([blocks, more], 1)
    return (blocks.flatten(0, 1) if which == 0 else blocks).contiguous()


def rank_of(factor: Tensor, which: int, groups: int) -> int:
    """Return the rank of A (`which` 0) or of B (1)."""
    return factor.shape[0] if which == 0 else factor.shape[1] * groups


@torch.no_grad()
def set_factor(part: nn.Module | nn.Parameter, which: int, groups: int, value: Tensor) -> None:
    """Put other numbers into a factor, in place where it has their size, and else in new memory.

    Args:
        part: The parameter, or the linear layer or convolution that holds it.
        which: 0 for A, 1 for B.
        groups: Those of the base layer.
        value: The numbers.
    """
    parameter: Any = part if isinstance(part, nn.Parameter) else part.weight
    if parameter.shape == value.shape:
        parameter.copy_(value)
        return
    rank = rank_of(value, which, groups)
    gradient = parameter.grad
    parameter.grad = None
    parameter.data = value.to(device=parameter.device, dtype=parameter.dtype, copy=True)
    if gradient is not None:
        parameter.grad = resized(gradient, which, groups, rank)
    if isinstance(part, nn.Module):
        for name in _SIZES[1 - which :: 2]:
            if hasattr(part, name):
                setattr(part, name, rank)
