"""Products of rows that are sorted by group: a grid over tiles of rows, each of one group.

Nothing on the host reads the offsets. The grid has room for the tiles that any offsets give, and each program finds its
tile by counting those of the groups before it. Rows of no group are one group more, without factors. Offsets that do
not ascend, or exceed the rows, leave that one group with all rows, and NaN in every result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from .low_rank_products import _gated_rows, gate_arguments, rank_tile_of

MAX_GROUPS = 4095
"""More would make the vector long in which every program counts tiles; no timing picked it."""


@triton.jit
def _groups(offsets_ptr, rows, groups, BLOCK_GROUPS: tl.constexpr):
    """Return numbers, starts and ends of the groups and of the rows of none behind them, and whether they are right."""
    at = tl.arange(0, BLOCK_GROUPS)  # [BLOCK_GROUPS]
    end = tl.load(offsets_ptr + at, mask=at < groups, other=0).to(tl.int64)  # [BLOCK_GROUPS]
    end = tl.where(at < groups, end, rows)
    start = tl.load(offsets_ptr + at - 1, mask=(at > 0) & (at <= groups), other=0).to(tl.int64)  # [BLOCK_GROUPS]
    start = tl.where(at <= groups, start, rows)
    bad = tl.max((start > end).to(tl.int32), 0) > 0
    return at, tl.where(bad & (at <= groups), 0, start), tl.where(bad & (at < groups), 0, end), bad


@triton.jit
def _tile(offsets_ptr, rows, groups, index, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """Return group, first row and end of the rows of a tile, and NaN for wrong offsets, else zero."""
    at, start, end, bad = _groups(offsets_ptr, rows, groups, BLOCK_GROUPS)
    tiles = (end - start + BLOCK_ROWS - 1) // BLOCK_ROWS  # [BLOCK_GROUPS]
    group = tl.sum((tl.cumsum(tiles, 0) <= index).to(tl.int32), 0)
    before = tl.sum(tl.where(at < group, tiles, 0), 0)
    first = tl.sum(tl.where(at == group, start, 0), 0) + (index - before) * BLOCK_ROWS
    last = tl.sum(tl.where(at == group, end, 0), 0)
    return group, first, last, tl.where(bad, float("nan"), 0.0)


@triton.jit
def _grouped_shrink_kernel(
    out_ptr,
    x_ptr,
    factor_ptr,
    offsets_ptr,
    rows,
    groups,
    features,
    rank,
    stride_out_row,
    stride_x_row,
    stride_factor_group,
    stride_factor_rank,
    stride_factor_feature,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Compute out (rows, rank) = x @ factor[g].T, with factors of (rank, features); zeros in the rows of no group."""
    rank_tiles = tl.cdiv(rank, BLOCK_RANK)
    index = (tl.program_id(0) // rank_tiles).to(tl.int64)
    group, first, last, poison = _tile(offsets_ptr, rows, groups, index, BLOCK_ROWS, BLOCK_GROUPS)
    if first >= last:
        return
    row = first + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    ranks = (tl.program_id(0) % rank_tiles).to(tl.int64) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)  # [BLOCK_RANK]
    inside = row < last  # [BLOCK_ROWS]
    factor_ptr += group.to(tl.int64) * stride_factor_group
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_RANK]
    width = tl.where(group < groups, features, 0)
    for start in range(0, width, BLOCK_FEATURES):
        columns = start + tl.arange(0, BLOCK_FEATURES)  # [BLOCK_FEATURES]
        x = tl.load(
            x_ptr + row[:, None] * stride_x_row + columns[None, :],
            mask=inside[:, None] & (columns[None, :] < features),
            other=0.0,
        )  # [BLOCK_ROWS, BLOCK_FEATURES]
        factor = tl.load(
            factor_ptr + columns.to(tl.int64)[:, None] * stride_factor_feature + ranks[None, :] * stride_factor_rank,
            mask=(columns[:, None] < features) & (ranks[None, :] < rank),
            other=0.0,
        )  # [BLOCK_FEATURES, BLOCK_RANK]
        accumulator = tl.dot(x, factor, accumulator, input_precision="ieee")
    tl.store(
        out_ptr + row[:, None] * stride_out_row + ranks[None, :],
        (accumulator + poison).to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (ranks[None, :] < rank),
    )


@triton.jit
def _grouped_expand_kernel(
    out_ptr,
    base_ptr,
    hidden_ptr,
    factor_ptr,
    offsets_ptr,
    gate_ptr,
    rows,
    groups,
    features,
    rank,
    scale,
    stride_out_row,
    stride_base_row,
    stride_hidden_row,
    stride_factor_group,
    stride_factor_feature,
    stride_factor_rank,
    stride_gate_row,
    ZEROS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Compute out (rows, features) = base + scale * (hidden * gate) @ factor[g].T, with factors of (features, rank).

    base and gate may be None. Rows of no group are those of the base, or zeros whatever the base has there.
    """
    column_tiles = tl.cdiv(features, BLOCK_FEATURES)
    index = (tl.program_id(0) // column_tiles).to(tl.int64)
    group, first, last, poison = _tile(offsets_ptr, rows, groups, index, BLOCK_ROWS, BLOCK_GROUPS)
    if first >= last:
        return
    row = first + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    columns = (tl.program_id(0) % column_tiles) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)  # [BLOCK_FEATURES]
    inside = (row < last)[:, None] & (columns < features)[None, :]  # [BLOCK_ROWS, BLOCK_FEATURES]
    factor_ptr += group.to(tl.int64) * stride_factor_group
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_FEATURES]
    width = tl.where(group < groups, rank, 0)
    for start in range(0, width, BLOCK_RANK):
        ranks = start + tl.arange(0, BLOCK_RANK)  # [BLOCK_RANK]
        # [BLOCK_ROWS, BLOCK_RANK]
        hidden = _gated_rows(hidden_ptr, gate_ptr, row, ranks, last, rank, stride_hidden_row, stride_gate_row)
        factor = tl.load(
            factor_ptr
            + columns.to(tl.int64)[None, :] * stride_factor_feature
            + ranks.to(tl.int64)[:, None] * stride_factor_rank,
            mask=(columns[None, :] < features) & (ranks[:, None] < rank),
            other=0.0,
        )  # [BLOCK_RANK, BLOCK_FEATURES]
        accumulator = tl.dot(hidden, factor, accumulator, input_precision="ieee")
    y = accumulator * scale + poison  # [BLOCK_ROWS, BLOCK_FEATURES]
    if base_ptr is not None:
        # [BLOCK_ROWS, BLOCK_FEATURES]
        base = tl.load(base_ptr + row[:, None] * stride_base_row + columns[None, :], mask=inside, other=0.0)
        base = base.to(tl.float32)
        if ZEROS:
            base = tl.where(group < groups, base, 0.0)
        # -0.0 + 0.0 is +0.0: where the product is zero, every bit of the base stays.
        y = tl.where(y == 0.0, base, base + y)
    tl.store(out_ptr + row[:, None] * stride_out_row + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grouped_factor_kernel(
    partials_ptr,
    hidden_ptr,
    x_ptr,
    offsets_ptr,
    gate_ptr,
    rows,
    groups,
    features,
    rank,
    stride_chunk,
    stride_out_feature,
    stride_out_rank,
    stride_hidden_row,
    stride_x_row,
    stride_gate_row,
    WIDE: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """partials[chunk] = x.T @ (hidden * gate) over a chunk of the rows of one group, stored by the strides given."""
    rank_tiles = tl.cdiv(rank, BLOCK_RANK)
    tiles = tl.cdiv(features, BLOCK_FEATURES) * rank_tiles
    chunk = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    group, first, last, _poison = _tile(offsets_ptr, rows, groups, chunk, CHUNK_ROWS, BLOCK_GROUPS)
    if (first >= last) | (group >= groups):
        return
    ranks = (tile % rank_tiles).to(tl.int64) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)  # [BLOCK_RANK]
    # [BLOCK_FEATURES]
    columns = (tile // rank_tiles).to(tl.int64) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    accumulator = tl.zeros((BLOCK_FEATURES, BLOCK_RANK), dtype=tl.float32)  # [BLOCK_FEATURES, BLOCK_RANK]
    for start in range(0, CHUNK_ROWS, BLOCK_ROWS):
        row = first + start + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        x = tl.load(
            x_ptr + row[:, None] * stride_x_row + columns[None, :],
            mask=(row[:, None] < last) & (columns[None, :] < features),
            other=0.0,
        )  # [BLOCK_ROWS, BLOCK_FEATURES]
        # [BLOCK_ROWS, BLOCK_RANK]
        hidden = _gated_rows(hidden_ptr, gate_ptr, row, ranks, last, rank, stride_hidden_row, stride_gate_row)
        if WIDE:
            # float16 has no room for hidden.
            x = x.to(tl.float32)
        accumulator = tl.dot(tl.trans(x), hidden, accumulator, input_precision="ieee")
    tl.store(
        partials_ptr + chunk * stride_chunk + columns[:, None] * stride_out_feature + ranks[None, :] * stride_out_rank,
        accumulator,
        mask=(columns[:, None] < features) & (ranks[None, :] < rank),
    )


@triton.jit
def _grouped_sum_kernel(
    out_ptr,
    partials_ptr,
    offsets_ptr,
    rows,
    groups,
    count,
    scale,
    CHUNK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute out[g] = scale * the sum of the chunks of group g, each of (count,), always in the same order."""
    blocks = tl.cdiv(count, BLOCK)
    wanted = (tl.program_id(0) // blocks).to(tl.int64)
    at, start, end, bad = _groups(offsets_ptr, rows, groups, BLOCK_GROUPS)
    chunks = (end - start + CHUNK_ROWS - 1) // CHUNK_ROWS  # [BLOCK_GROUPS]
    first = tl.sum(tl.where(at < wanted, chunks, 0), 0)
    number = tl.sum(tl.where(at == wanted, chunks, 0), 0)
    offsets = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros((BLOCK,), dtype=tl.float32)  # [BLOCK]
    for chunk in range(number):
        total += tl.load(partials_ptr + (first + chunk) * count + offsets, mask=offsets < count, other=0.0)
    total = total * scale + tl.where(bad, float("nan"), 0.0)
    tl.store(out_ptr + wanted * count + offsets, total, mask=offsets < count)


def _groups_block(groups: int) -> int:
    """Return the length of the vector of groups, with one place for the rows of none."""
    return max(16, triton.next_power_of_2(groups + 1))


def _tiles(rows: int, groups: int, block_rows: int) -> int:
    """Return how many tiles of rows any offsets give at most."""
    return triton.cdiv(rows, block_rows) + groups


def _shrink_config(rank_tile: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of a shrink: small ones waste less on groups of few rows; no timing picked it.

    float32 tiles stay below 64 rows for the reason that `low_rank_products` gives. A half-precision tile of rank 16 is
    stored by two warps: four would store 64 bits each.
    """
    if dtype is torch.float32:
        return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 32, "num_warps": 4, "num_stages": 2}
    if rank_tile == 16:
        return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 64, "num_warps": 2, "num_stages": 3}
    return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 128, "num_warps": 4, "num_stages": 3}


def _expand_config(rank_tile: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of an expand, for the reasons of `_shrink_config`; in float32 a rank tile of 64 spills."""
    if dtype is torch.float32:
        return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 64, "BLOCK_RANK": min(rank_tile, 32), "num_warps": 4}
    return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 128, "BLOCK_RANK": rank_tile, "num_warps": 4}


def _factor_config(dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of a factor's gradient, and how many rows of a group a program sums; no timing picked it."""
    if dtype is torch.float32:
        return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 32, "CHUNK_ROWS": 512, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 64, "CHUNK_ROWS": 512, "num_warps": 4, "num_stages": 2}


def _sum_config() -> dict[str, int]:
    """Return how many numbers a program adds up; no timing picked it."""
    return {"BLOCK": 512, "num_warps": 4}


def shrink(out: Tensor, x: Tensor, factors: Tensor, strides: tuple[int, int, int], offsets: Tensor) -> Tensor:
    """Write ``x @ factor.T`` for each group; strides are the factors' along groups, rank and features."""
    (rows, features), rank, groups = x.shape, out.shape[1], offsets.shape[0]
    rank_tile = rank_tile_of(rank)
    config = _shrink_config(rank_tile, x.dtype)
    _launch.launch(
        _grouped_shrink_kernel,
        (_tiles(rows, groups, config["BLOCK_ROWS"]) * triton.cdiv(rank, rank_tile),),
        out_ptr=out,
        x_ptr=x,
        factor_ptr=factors,
        offsets_ptr=offsets,
        rows=rows,
        groups=groups,
        features=features,
        rank=rank,
        stride_out_row=rank,
        stride_x_row=x.stride(0),
        stride_factor_group=strides[0],
        stride_factor_rank=strides[1],
        stride_factor_feature=strides[2],
        BLOCK_GROUPS=_groups_block(groups),
        BLOCK_RANK=rank_tile,
        **config,
    )
    return out


def expand(
    out: Tensor,
    base: Tensor | None,
    hidden: Tensor,
    factors: Tensor,
    strides: tuple[int, int, int],
    offsets: Tensor,
    gate: Tensor | None,
    scale: float,
    *,
    zeros: bool = False,
) -> Tensor:
    """Write ``base + scale * (hidden * gate) @ factor.T`` for each group; strides as in `shrink`.

    With `zeros` the rows of no group get zeros, else those of the base.
    """
    (rows, features), rank, groups = out.shape, hidden.shape[1], offsets.shape[0]
    config = _expand_config(rank_tile_of(rank), hidden.dtype)
    _launch.launch(
        _grouped_expand_kernel,
        (_tiles(rows, groups, config["BLOCK_ROWS"]) * triton.cdiv(features, config["BLOCK_FEATURES"]),),
        out_ptr=out,
        base_ptr=base,
        hidden_ptr=hidden,
        factor_ptr=factors,
        offsets_ptr=offsets,
        rows=rows,
        groups=groups,
        features=features,
        rank=rank,
        scale=scale,
        stride_out_row=out.stride(0),
        stride_base_row=(out if base is None else base).stride(0),
        stride_hidden_row=hidden.stride(0),
        stride_factor_group=strides[0],
        stride_factor_rank=strides[1],
        stride_factor_feature=strides[2],
        ZEROS=zeros,
        BLOCK_GROUPS=_groups_block(groups),
        **gate_arguments(gate),
        **config,
    )
    return out


def factor_gradient(
    hidden: Tensor, x: Tensor, offsets: Tensor, gate: Tensor | None, scale: float, *, rank_first: bool
) -> Tensor:
    """Return ``scale * (hidden * gate).T @ x`` of each group: (groups, rank, features), or the last two swapped."""
    (rows, features), rank, groups = x.shape, hidden.shape[1], offsets.shape[0]
    wide = hidden.dtype is not x.dtype
    rank_tile, config = rank_tile_of(rank), _factor_config(torch.float32 if wide else x.dtype)
    blocks, chunks = _groups_block(groups), _tiles(rows, groups, config["CHUNK_ROWS"])
    shape = (rank, features) if rank_first else (features, rank)
    partials = torch.empty(chunks, *shape, dtype=torch.float32, device=x.device)
    _launch.launch(
        _grouped_factor_kernel,
        (chunks * triton.cdiv(features, config["BLOCK_FEATURES"]) * triton.cdiv(rank, rank_tile),),
        partials_ptr=partials,
        hidden_ptr=hidden,
        x_ptr=x,
        offsets_ptr=offsets,
        rows=rows,
        groups=groups,
        features=features,
        rank=rank,
        stride_chunk=rank * features,
        stride_out_feature=1 if rank_first else rank,
        stride_out_rank=features if rank_first else 1,
        stride_hidden_row=hidden.stride(0),
        stride_x_row=x.stride(0),
        WIDE=wide,
        BLOCK_GROUPS=blocks,
        BLOCK_RANK=rank_tile,
        **gate_arguments(gate),
        **config,
    )
    out = torch.empty(groups, *shape, dtype=torch.float32, device=x.device)
    sums = _sum_config()
    _launch.launch(
        _grouped_sum_kernel,
        (groups * triton.cdiv(rank * features, sums["BLOCK"]),),
        out_ptr=out,
        partials_ptr=partials,
        offsets_ptr=offsets,
        rows=rows,
        groups=groups,
        count=rank * features,
        scale=scale,
        CHUNK_ROWS=config["CHUNK_ROWS"],
        BLOCK_GROUPS=blocks,
        **sums,
    )
    return out
