"""What the backends of the grouped low-rank product share: where groups end, and products with a factor for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear


def sizes_of(offsets: Tensor, rows: int) -> list[int]:
    """Return how many rows each group has, and last how many belong to none; on "meta" all groups have the same number.

    Raises:
        ValueError: if the ends of the groups do not ascend from 0 to at most the number of rows.
    """
    if offsets.is_meta:
        groups = offsets.shape[0]
        return [rows // groups] * groups + [rows % groups]
    sizes, start = [], 0
    for group, end in enumerate(offsets.tolist()):
        if not start <= end <= rows:
            raise ValueError(
                f"offsets: expected the row at which each group ends, ascending from 0 to at most {rows}, the rows of "
                f"x; got {end} for group {group}, which starts at row {start}"
            )
        sizes.append(end - start)
        start = end
    return [*sizes, rows - start]


def by_group(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, factors: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the products of each group's rows with its own factor, and zeros for the rows of no group.

    Args:
        product: (rows of a group, in) and a factor to (rows of a group, out).
        x: (rows, in).
        factors: one factor a group, (groups, ...).
        sizes: what `sizes_of` returns.
    """
    *groups, others = x.split(list(sizes))
    found = [product(rows, factor) for rows, factor in zip(groups, factors.unbind(), strict=True)]
    return torch.cat([*found, found[0].new_zeros(others.shape[0], found[0].shape[1])])


def shrunk(x: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """Return the rank-sized product, (rows, rank): each row by the first factor of its group."""
    return by_group(linear, x, a, sizes_of(offsets, x.shape[0]))


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor, *, zeros: bool = True) -> Tensor:
    """Return the product of rows sorted by group with the weight of each group, and zeros for the rows of no group.

    Args:
        x: (rows, in).
        weight: (groups, in, out), of any strides; each is cast to the dtype of x when it is its turn.
        offsets: (groups,), where the rows of each group end.
        zeros: Without, anything may stand in the rows of no group, which a caller overwrites.
    """
    if not x.is_cpu and x.dtype is torch.bfloat16 and not (x.shape[1] % 8 or weight.shape[2] % 8):
        # Nothing waits for the offsets, and wrong ones must not lead out of the tensors.
        ends = offsets.clamp(0, len(x)).cummax(0).values
        y = grouped_mm(x, weight.to(x.dtype), offs=ends.int())
        if not zeros:
            return y
        covered = torch.arange(len(x), device=x.device) < ends[-1]
        return torch.where(covered[:, None], y, 0.0)
    y = x.new_empty(len(x), weight.shape[2])
    start = 0
    *sizes, others = sizes_of(offsets, len(x))
    for group, size in enumerate(sizes):
        if size:
            torch.mm(x[start : start + size], weight[group].to(x.dtype), out=y[start : start + size])
        start += size
    if others:
        y[start:] = 0.0
    return y
