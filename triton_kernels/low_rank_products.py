"""The two rank-sized products: one pass over x for ``dropout(x) @ a.T``, one over the output for adding ``@ b.T``.

The rank is padded to at least 16 lanes, which ``tl.dot`` needs, and cut into tiles of at most 64: Triton 3.7 was
reported to miscompile accumulators of rank tile 128.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._philox import KEEP_ALL, RANDOM, _kept, keep_arguments

RANK_TILE = 64


@triton.jit(do_not_specialize=RANDOM)
def _shrink_kernel(
    out_ptr,
    x_ptr,
    factor_ptr,
    rows,
    features,
    rank,
    scale,
    stride_out_row,
    stride_x_row,
    stride_factor_rank,
    stride_factor_feature,
    seed_low,
    seed_high,
    threshold,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Compute out (rows, rank) = scale * keep(x) @ factor.T, with a factor of (rank, features)."""
    # The rank tiles of one row tile are neighbours: beyond rank 64 they find x in the L2 cache.
    rank_tiles = tl.cdiv(rank, BLOCK_RANK)
    row = (tl.program_id(0) // rank_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    ranks = (tl.program_id(0) % rank_tiles).to(tl.int64) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)  # [BLOCK_RANK]
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_RANK]
    for start in range(0, features, BLOCK_FEATURES):
        columns = start + tl.arange(0, BLOCK_FEATURES)  # [BLOCK_FEATURES]
        x = tl.load(
            x_ptr + row[:, None] * stride_x_row + columns[None, :],
            mask=(row[:, None] < rows) & (columns[None, :] < features),
            other=0.0,
        )  # [BLOCK_ROWS, BLOCK_FEATURES]
        if DROPOUT:
            # [BLOCK_ROWS, BLOCK_FEATURES]
            kept = _kept(row, start, features, seed_low, seed_high, threshold, BLOCK_ROWS, BLOCK_FEATURES, ALIGNED)
            x = tl.where(kept, x, 0.0)
        factor = tl.load(
            factor_ptr + columns.to(tl.int64)[:, None] * stride_factor_feature + ranks[None, :] * stride_factor_rank,
            mask=(columns[:, None] < features) & (ranks[None, :] < rank),
            other=0.0,
        )  # [BLOCK_FEATURES, BLOCK_RANK]
        accumulator = tl.dot(x, factor, accumulator, input_precision="ieee")
    tl.store(
        out_ptr + row[:, None] * stride_out_row + ranks[None, :],
        (accumulator * scale).to(out_ptr.dtype.element_ty),
        mask=(row[:, None] < rows) & (ranks[None, :] < rank),
    )


@triton.jit
def _gated_rows(hidden_ptr, gate_ptr, row, ranks, rows, rank, stride_hidden_row, stride_gate_row):
    """Load a tile of hidden times its gate, rounded as the unfused product is; a shared gate has row stride 0."""
    mask = (row[:, None] < rows) & (ranks[None, :] < rank)  # [BLOCK_ROWS, BLOCK_RANK]
    # [BLOCK_ROWS, BLOCK_RANK]
    hidden = tl.load(hidden_ptr + row[:, None] * stride_hidden_row + ranks[None, :], mask=mask, other=0.0)
    if gate_ptr is not None:
        # [BLOCK_ROWS, BLOCK_RANK]
        gate = tl.load(gate_ptr + row[:, None] * stride_gate_row + ranks[None, :], mask=mask, other=0.0)
        hidden = (hidden.to(tl.float32) * gate).to(hidden_ptr.dtype.element_ty)
    return hidden


@triton.jit(do_not_specialize=RANDOM)
def _expand_kernel(
    out_ptr,
    base_ptr,
    hidden_ptr,
    factor_ptr,
    gate_ptr,
    bias_ptr,
    rows,
    features,
    rank,
    scale,
    stride_out_row,
    stride_base_row,
    stride_hidden_row,
    stride_factor_feature,
    stride_factor_rank,
    stride_gate_row,
    seed_low,
    seed_high,
    threshold,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Compute out (rows, features) = base + bias + keep(scale * (hidden * gate) @ factor.T).

    The factor is (features, rank); out may be base itself. base, gate and bias may be None.
    """
    tiles = tl.cdiv(features, BLOCK_FEATURES)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    start = (tl.program_id(0) % tiles) * BLOCK_FEATURES
    columns = start + tl.arange(0, BLOCK_FEATURES)  # [BLOCK_FEATURES]
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_FEATURES]
    for first in range(0, rank, BLOCK_RANK):
        ranks = first + tl.arange(0, BLOCK_RANK)  # [BLOCK_RANK]
        # [BLOCK_ROWS, BLOCK_RANK]
        hidden = _gated_rows(hidden_ptr, gate_ptr, row, ranks, rows, rank, stride_hidden_row, stride_gate_row)
        factor = tl.load(
            factor_ptr
            + columns.to(tl.int64)[None, :] * stride_factor_feature
            + ranks.to(tl.int64)[:, None] * stride_factor_rank,
            mask=(columns[None, :] < features) & (ranks[:, None] < rank),
            other=0.0,
        )  # [BLOCK_RANK, BLOCK_FEATURES]
        accumulator = tl.dot(hidden, factor, accumulator, input_precision="ieee")
    y = accumulator * scale  # [BLOCK_ROWS, BLOCK_FEATURES]
    if DROPOUT:
        # [BLOCK_ROWS, BLOCK_FEATURES]
        kept = _kept(row, start, features, seed_low, seed_high, threshold, BLOCK_ROWS, BLOCK_FEATURES, ALIGNED)
        y = tl.where(kept, y, 0.0)
    mask = (row[:, None] < rows) & (columns[None, :] < features)  # [BLOCK_ROWS, BLOCK_FEATURES]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < features, other=0.0).to(tl.float32)[None, :]
    if base_ptr is not None:
        # [BLOCK_ROWS, BLOCK_FEATURES]
        base = tl.load(base_ptr + row[:, None] * stride_base_row + columns[None, :], mask=mask, other=0.0)
        base = base.to(tl.float32)
        # -0.0 + 0.0 is +0.0: where the product is zero, every bit of the base stays.
        y = tl.where(y == 0.0, base, base + y)
    tl.store(out_ptr + row[:, None] * stride_out_row + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


def rank_tile_of(rank: int) -> int:
    """Return the lanes of a rank tile, for a rank of at most `RANK_TILE` all of it."""
    return min(RANK_TILE, max(16, 1 << (rank - 1).bit_length()))


def as_rows(x: Tensor) -> Tensor:
    """Return x as a matrix whose rows are contiguous; a copy only where its strides ask for one."""
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def mask_arguments(columns: int, dropout_p: float, seed: Tensor | None) -> dict[str, int | bool]:
    """Return a kernel's arguments of the mask of a tensor with so many columns."""
    if seed is None:
        return {**KEEP_ALL, "DROPOUT": False, "ALIGNED": False}
    return {**keep_arguments(dropout_p, seed), "DROPOUT": True, "ALIGNED": columns % 4 == 0}


def gate_arguments(gate: Tensor | None) -> dict[str, Any]:
    """Return a kernel's arguments of the gate."""
    if gate is None:
        return {"gate_ptr": None, "stride_gate_row": 0}
    if gate.dim() == 1:
        return {"gate_ptr": gate.contiguous(), "stride_gate_row": 0}
    rows = as_rows(gate)
    return {"gate_ptr": rows, "stride_gate_row": rows.stride(0)}


def _shrink_config(rows: int, rank_tile: int, dtype: torch.dtype, mask: dict[str, Any]) -> dict[str, int]:
    """Return the tile of a shrink.

    float32 tiles stay below 64 rows of output: from there on Triton 3.7 may compute an "ieee" dot of masked float32
    operands in tf32 on sm_100. A mask of rows that do not start on a multiple of four is drawn element by element:
    small tiles, or its words spill.
    """
    dropout = mask["DROPOUT"]
    if dtype is torch.float32 or (dropout and not mask["ALIGNED"]):
        rows = 16 if dropout and rank_tile == 64 else 32
        return {"BLOCK_ROWS": rows, "BLOCK_FEATURES": 32, "num_warps": 4, "num_stages": 2}
    if rank_tile == 64 and rows > 4096 and not dropout:
        return {"BLOCK_ROWS": 64, "BLOCK_FEATURES": 64, "num_warps": 8, "num_stages": 4}
    # The mask takes registers: half the columns at once spill none.
    columns = 128 if rank_tile == 16 and not dropout else 64
    return {"BLOCK_ROWS": 64 if rows > 4096 else 16, "BLOCK_FEATURES": columns, "num_warps": 4, "num_stages": 3}


def _expand_config(dtype: torch.dtype, mask: dict[str, Any]) -> dict[str, int]:
    """Return the tile of an expand, small for the reasons of `_shrink_config`."""
    if dtype is torch.float32 or (mask["DROPOUT"] and not mask["ALIGNED"]):
        return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 64, "num_warps": 4}
    return {"BLOCK_ROWS": 64, "BLOCK_FEATURES": 128, "num_warps": 4}


def shrink(
    x: Tensor,
    factor: Tensor,
    strides: tuple[int, int],
    rank: int,
    out: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Write ``dropout(x) @ factor.T``; strides are the factor's along rank and features."""
    rows, features = x.shape
    rank_tile = rank_tile_of(rank)
    mask = mask_arguments(features, dropout_p, seed)
    config = _shrink_config(rows, rank_tile, x.dtype, mask)
    _launch.launch(
        _shrink_kernel,
        (triton.cdiv(rows, config["BLOCK_ROWS"]) * triton.cdiv(rank, rank_tile),),
        out_ptr=out,
        x_ptr=x,
        factor_ptr=factor,
        rows=rows,
        features=features,
        rank=rank,
        scale=1.0 / (1.0 - dropout_p),
        stride_out_row=rank,
        stride_x_row=x.stride(0),
        stride_factor_rank=strides[0],
        stride_factor_feature=strides[1],
        BLOCK_RANK=rank_tile,
        **mask,
        **config,
    )
    return out


def expand(
    out: Tensor,
    base: Tensor | None,
    hidden: Tensor,
    factor: Tensor,
    strides: tuple[int, int],
    gate: Tensor | None,
    scale: float,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Write ``base + bias + dropout(scale * (hidden * gate) @ factor.T)``; strides as in `shrink`. out may be base."""
    rows, features = out.shape
    rank = hidden.shape[1]
    rank_tile = rank_tile_of(rank)
    mask = mask_arguments(features, dropout_p, seed)
    config = _expand_config(hidden.dtype, mask)
    _launch.launch(
        _expand_kernel,
        (triton.cdiv(rows, config["BLOCK_ROWS"]) * triton.cdiv(features, config["BLOCK_FEATURES"]),),
        out_ptr=out,
        base_ptr=base,
        hidden_ptr=hidden,
        factor_ptr=factor,
        bias_ptr=bias,
        rows=rows,
        features=features,
        rank=rank,
        scale=scale / (1.0 - dropout_p),
        stride_out_row=out.stride(0),
        stride_base_row=(out if base is None else base).stride(0),
        stride_hidden_row=hidden.stride(0),
        stride_factor_feature=strides[1],
        stride_factor_rank=strides[0],
        BLOCK_RANK=rank_tile,
        **gate_arguments(gate),
        **mask,
        **config,
    )
    return out
