"""Gradients of the low-rank product: sums over tokens, split into chunks.

How many chunks follows from the shape alone. Each writes its float32 partial sum to a workspace, and `_sum_kernel`
adds them in order: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._philox import RANDOM, _kept
from .low_rank_products import RANK_TILE, _gated_rows, gate_arguments, mask_arguments, rank_tile_of

PROGRAMS = 512
"""Programs that a split sum aims at: a few for each multiprocessor of a large GPU."""


@triton.jit
def _backward_kernel(
    dhidden_ptr,
    db_ptr,
    grad_ptr,
    hidden_ptr,
    b_ptr,
    gate_ptr,
    rows,
    features,
    rank,
    chunk_rows,
    stride_dhidden_tile,
    stride_db_chunk,
    stride_grad_row,
    stride_hidden_row,
    stride_b_row,
    stride_gate_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Read a chunk of rows of one column tile of the incoming gradient once, for both products that it enters.

    dhidden (tiles, rows, rank): grad @ b over the columns of this tile.
    db (chunks, features, rank): grad.T @ (hidden * gate) over the rows of this chunk.
    """
    tiles = tl.cdiv(features, BLOCK_FEATURES)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    chunk = (tl.program_id(0) // tiles).to(tl.int64)
    columns = tile * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)  # [BLOCK_FEATURES]
    ranks = tl.arange(0, BLOCK_RANK)  # [BLOCK_RANK]
    factor_mask = (columns[:, None] < features) & (ranks[None, :] < rank)  # [BLOCK_FEATURES, BLOCK_RANK]
    # [BLOCK_FEATURES, BLOCK_RANK]
    b = tl.load(b_ptr + columns[:, None] * stride_b_row + ranks[None, :], mask=factor_mask, other=0.0)
    accumulator = tl.zeros((BLOCK_FEATURES, BLOCK_RANK), dtype=tl.float32)  # [BLOCK_FEATURES, BLOCK_RANK]
    # Not pipelined: Triton 3.7 was reported to miscompile a store inside a pipelined loop. Several programs share a
    # multiprocessor instead.
    for start in tl.range(0, chunk_rows, BLOCK_ROWS, num_stages=1):
        row = chunk * chunk_rows + start + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        grad = tl.load(
            grad_ptr + row[:, None] * stride_grad_row + columns[None, :],
            mask=(row[:, None] < rows) & (columns[None, :] < features),
            other=0.0,
        )  # [BLOCK_ROWS, BLOCK_FEATURES]
        # [BLOCK_ROWS, BLOCK_RANK]
        hidden = _gated_rows(hidden_ptr, gate_ptr, row, ranks, rows, rank, stride_hidden_row, stride_gate_row)
        tl.store(
            dhidden_ptr + tile * stride_dhidden_tile + row[:, None] * rank + ranks[None, :],
            tl.dot(grad, b, input_precision="ieee"),
            mask=(row[:, None] < rows) & (ranks[None, :] < rank),
        )
        accumulator = tl.dot(tl.trans(grad), hidden, accumulator, input_precision="ieee")
    tl.store(db_ptr + chunk * stride_db_chunk + columns[:, None] * rank + ranks[None, :], accumulator, mask=factor_mask)


@triton.jit
def _hidden_gradient_kernel(
    out_ptr,
    dgate_ptr,
    partials_ptr,
    hidden_ptr,
    gate_ptr,
    rows,
    rank,
    chunks,
    scale,
    stride_partial,
    stride_hidden_row,
    stride_gate_row,
    SHARED_GATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Add the partial sums of ``grad @ b`` in order; out = scale * sum * gate, dgate = scale * sum * hidden.

    The gradient of a shared gate is left as (row tiles, rank) partial sums. gate and dgate may be None.
    """
    rank_tiles = tl.cdiv(rank, BLOCK_RANK)
    tile = (tl.program_id(0) // rank_tiles).to(tl.int64)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    ranks = (tl.program_id(0) % rank_tiles) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)  # [BLOCK_RANK]
    mask = (row[:, None] < rows) & (ranks[None, :] < rank)  # [BLOCK_ROWS, BLOCK_RANK]
    offsets = row[:, None] * rank + ranks[None, :]  # [BLOCK_ROWS, BLOCK_RANK]
    total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_RANK]
    for chunk in range(chunks):
        total += tl.load(partials_ptr + tl.cast(chunk, tl.int64) * stride_partial + offsets, mask=mask, other=0.0)
    total *= scale
    if dgate_ptr is not None:
        # [BLOCK_ROWS, BLOCK_RANK]
        hidden = tl.load(hidden_ptr + row[:, None] * stride_hidden_row + ranks[None, :], mask=mask, other=0.0)
        dgate = total * hidden.to(tl.float32)  # [BLOCK_ROWS, BLOCK_RANK]
        if SHARED_GATE:
            tl.store(dgate_ptr + tile * rank + ranks, tl.sum(dgate, 0), mask=ranks < rank)
        else:
            tl.store(dgate_ptr + offsets, dgate, mask=mask)
    if gate_ptr is not None:
        total *= tl.load(gate_ptr + row[:, None] * stride_gate_row + ranks[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RANDOM)
def _factor_gradient_kernel(
    partials_ptr,
    hidden_ptr,
    x_ptr,
    gate_ptr,
    rows,
    features,
    rank,
    chunk_rows,
    stride_chunk,
    stride_out_feature,
    stride_out_rank,
    stride_hidden_row,
    stride_x_row,
    stride_gate_row,
    seed_low,
    seed_high,
    threshold,
    WIDE: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """partials[chunk] = keep(x).T @ (hidden * gate) over the rows of a chunk, stored by the strides given."""
    rank_tiles = tl.cdiv(rank, BLOCK_RANK)
    tiles = tl.cdiv(features, BLOCK_FEATURES) * rank_tiles
    chunk = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    ranks = (tile % rank_tiles).to(tl.int64) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)  # [BLOCK_RANK]
    first_column = tile // rank_tiles * BLOCK_FEATURES
    columns = first_column.to(tl.int64) + tl.arange(0, BLOCK_FEATURES)  # [BLOCK_FEATURES]
    accumulator = tl.zeros((BLOCK_FEATURES, BLOCK_RANK), dtype=tl.float32)  # [BLOCK_FEATURES, BLOCK_RANK]
    rest_of_hidden = tl.zeros((BLOCK_FEATURES, BLOCK_RANK), dtype=tl.float32)  # [BLOCK_FEATURES, BLOCK_RANK]
    rest_of_x = tl.zeros((BLOCK_FEATURES, BLOCK_RANK), dtype=tl.float32)  # [BLOCK_FEATURES, BLOCK_RANK]
    for start in range(0, chunk_rows, BLOCK_ROWS):
        row = chunk * chunk_rows + start + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        x = tl.load(
            x_ptr + row[:, None] * stride_x_row + columns[None, :],
            mask=(row[:, None] < rows) & (columns[None, :] < features),
            other=0.0,
        )  # [BLOCK_ROWS, BLOCK_FEATURES]
        if DROPOUT:
            kept = _kept(
                row, first_column, features, seed_low, seed_high, threshold, BLOCK_ROWS, BLOCK_FEATURES, ALIGNED
            )  # [BLOCK_ROWS, BLOCK_FEATURES]
            x = tl.where(kept, x, 0.0)
        # [BLOCK_ROWS, BLOCK_RANK]
        hidden = _gated_rows(hidden_ptr, gate_ptr, row, ranks, rows, rank, stride_hidden_row, stride_gate_row)
        if WIDE:
            # float16 has no room for hidden. Two bfloat16 numbers hold an x of float16 exactly, and enough of hidden.
            x_high = x.to(tl.bfloat16)  # [BLOCK_ROWS, BLOCK_FEATURES]
            x_low = (x.to(tl.float32) - x_high.to(tl.float32)).to(tl.bfloat16)  # [BLOCK_ROWS, BLOCK_FEATURES]
            high = hidden.to(tl.bfloat16)  # [BLOCK_ROWS, BLOCK_RANK]
            low = (hidden - high.to(tl.float32)).to(tl.bfloat16)  # [BLOCK_ROWS, BLOCK_RANK]
            # A sum for each product: on sm_100 Triton may miscompile two products that add to one.
            rest_of_hidden = tl.dot(tl.trans(x_high), low, rest_of_hidden, input_precision="ieee")
            rest_of_x = tl.dot(tl.trans(x_low), high, rest_of_x, input_precision="ieee")
            accumulator = tl.dot(tl.trans(x_high), high, accumulator, input_precision="ieee")
        else:
            accumulator = tl.dot(tl.trans(x), hidden, accumulator, input_precision="ieee")
    if WIDE:
        accumulator += rest_of_hidden + rest_of_x
    tl.store(
        partials_ptr + chunk * stride_chunk + columns[:, None] * stride_out_feature + ranks[None, :] * stride_out_rank,
        accumulator,
        mask=(columns[:, None] < features) & (ranks[None, :] < rank),
    )


@triton.jit
def _sum_kernel(out_ptr, partials_ptr, count, chunks, scale, BLOCK_CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute out = scale * the sum of the chunks of (chunks, count), always in the same order."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros((BLOCK_CHUNKS, BLOCK), dtype=tl.float32)  # [BLOCK_CHUNKS, BLOCK]
    # Several chunks are on their way at once: one after the other, each would wait for memory.
    for first in range(0, chunks, BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)  # [BLOCK_CHUNKS]
        total += tl.load(
            partials_ptr + chunk.to(tl.int64)[:, None] * count + offsets[None, :],
            mask=(chunk < chunks)[:, None] & (offsets < count)[None, :],
            other=0.0,
        )
    result = tl.sum(total, 0) * scale  # [BLOCK]
    tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=offsets < count)


def _sum_config() -> dict[str, int]:
    """Return how many numbers a program adds up, and of how many chunks at a time; no timing picked it."""
    return {"BLOCK_CHUNKS": 8, "BLOCK": 256, "num_warps": 1}


def _hidden_config(rank_tile: int) -> dict[str, int]:
    """Return the tile of a gradient in the rank-sized product.

    Small tiles: each program waits for one partial sum after the other, so there must be many programs.
    """
    return {"BLOCK_ROWS": 512 // rank_tile, "BLOCK_RANK": rank_tile, "num_warps": 2}


def _backward_config(rank_tile: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of the one pass over the gradient; wide, as each column tile leaves a partial ``grad @ b``."""
    if dtype is torch.float32:
        return {"BLOCK_ROWS": 16, "BLOCK_FEATURES": 64, "num_warps": 4}
    if rank_tile == 16:
        return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 256, "num_warps": 4}
    return {"BLOCK_ROWS": 64, "BLOCK_FEATURES": 256, "num_warps": 8}


def _factor_config(dtype: torch.dtype, mask: dict[str, Any], wide: bool) -> dict[str, int]:
    """Return the tile of a factor's gradient, for the reasons of `low_rank_products`; no timing picked it."""
    if wide and (mask["ALIGNED"] or not mask["DROPOUT"]):
        # Three sums and twice the operands: with the columns of other dtypes they spill.
        return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 64, "num_warps": 4, "num_stages": 2}
    if dtype is torch.float32 or (mask["DROPOUT"] and not mask["ALIGNED"]):
        return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_ROWS": 64, "BLOCK_FEATURES": 128, "num_warps": 4, "num_stages": 3}


def _split(rows: int, tiles: int, block_rows: int) -> tuple[int, int]:
    """Return how many chunks a sum over rows has, and how many rows each; from the shape alone."""
    chunk_rows = max(triton.cdiv(rows * tiles, PROGRAMS), 128)
    chunk_rows = triton.cdiv(chunk_rows, block_rows) * block_rows
    return max(1, triton.cdiv(rows, chunk_rows)), chunk_rows


def sum_chunks(partials: Tensor, shape: torch.Size, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Add partial sums in order, scale, and round once."""
    out = torch.empty(shape, dtype=dtype, device=partials.device)
    config = _sum_config()
    _launch.launch(
        _sum_kernel,
        (triton.cdiv(out.numel(), config["BLOCK"]),),
        out_ptr=out,
        partials_ptr=partials,
        count=out.numel(),
        chunks=partials.shape[0],
        scale=scale,
        **config,
    )
    return out


def worth_visiting(rank: int, dtype: torch.dtype) -> bool:
    """Say whether `visit` moves less memory than two passes over the gradient: one more reading costs its element
    size for each element, the partial sums of ``grad @ b`` a float32 write and read for each rank and column tile.
    """
    columns = _backward_config(rank_tile_of(rank), dtype)["BLOCK_FEATURES"]
    return rank <= RANK_TILE and 8 * rank <= columns * dtype.itemsize


def visit(grad: Tensor, hidden: Tensor, b: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return partial sums: ``grad @ b`` (tiles, rows, rank) and ``grad.T @ (hidden * gate)`` (chunks, out, rank)."""
    rows, features = grad.shape
    rank = b.shape[1]
    rank_tile = rank_tile_of(rank)
    config = _backward_config(rank_tile, grad.dtype)
    tiles = triton.cdiv(features, config["BLOCK_FEATURES"])
    chunks, chunk_rows = _split(rows, tiles, config["BLOCK_ROWS"])
    dhidden = torch.empty(tiles, rows, rank, dtype=torch.float32, device=grad.device)
    db = torch.empty(chunks, features, rank, dtype=torch.float32, device=grad.device)
    _launch.launch(
        _backward_kernel,
        (tiles * chunks,),
        dhidden_ptr=dhidden,
        db_ptr=db,
        grad_ptr=grad,
        hidden_ptr=hidden,
        b_ptr=b,
        rows=rows,
        features=features,
        rank=rank,
        chunk_rows=chunk_rows,
        stride_dhidden_tile=rows * rank,
        stride_db_chunk=features * rank,
        stride_grad_row=grad.stride(0),
        stride_hidden_row=hidden.stride(0),
        stride_b_row=b.stride(0),
        BLOCK_RANK=rank_tile,
        **gate_arguments(gate),
        **config,
    )
    return dhidden, db


def factor_gradient(
    hidden: Tensor,
    x: Tensor,
    gate: Tensor | None,
    *,
    rank_first: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return partial sums of ``(hidden * gate).T @ dropout(x)``, each (rank, features) or (features, rank)."""
    rows, features = x.shape
    rank = hidden.shape[1]
    rank_tile = rank_tile_of(rank)
    mask = mask_arguments(features, dropout_p, seed)
    config = _factor_config(x.dtype, mask, hidden.dtype is not x.dtype)
    tiles = triton.cdiv(features, config["BLOCK_FEATURES"]) * triton.cdiv(rank, rank_tile)
    chunks, chunk_rows = _split(rows, tiles, config["BLOCK_ROWS"])
    shape = (rank, features) if rank_first else (features, rank)
    partials = torch.empty(chunks, *shape, dtype=torch.float32, device=x.device)
    _launch.launch(
        _factor_gradient_kernel,
        (tiles * chunks,),
        partials_ptr=partials,
        hidden_ptr=hidden,
        x_ptr=x,
        rows=rows,
        features=features,
        rank=rank,
        chunk_rows=chunk_rows,
        stride_chunk=rank * features,
        stride_out_feature=1 if rank_first else rank,
        stride_out_rank=features if rank_first else 1,
        stride_hidden_row=hidden.stride(0),
        stride_x_row=x.stride(0),
        WIDE=hidden.dtype is not x.dtype,
        BLOCK_RANK=rank_tile,
        **gate_arguments(gate),
        **mask,
        **config,
    )
    return partials


def hidden_gradient(
    partials: Tensor, hidden: Tensor, gate: Tensor | None, scale: float, need_gate: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient in the rank-sized product (rows, rank), and that in the gate."""
    rows, rank = hidden.shape
    rank_tile = rank_tile_of(rank)
    config = _hidden_config(rank_tile)
    tiles = triton.cdiv(rows, config["BLOCK_ROWS"])
    shared = gate is not None and gate.dim() == 1
    # Not in float16: small ones would be lost, and large ones become infinite.
    dtype = torch.float32 if hidden.dtype is torch.float16 else hidden.dtype
    dhidden = torch.empty(rows, rank, dtype=dtype, device=hidden.device)
    dgate = None
    if need_gate:
        dgate = torch.empty(tiles if shared else rows, rank, dtype=torch.float32, device=hidden.device)
    _launch.launch(
        _hidden_gradient_kernel,
        (tiles * triton.cdiv(rank, rank_tile),),
        out_ptr=dhidden,
        dgate_ptr=dgate,
        partials_ptr=partials,
        hidden_ptr=hidden,
        rows=rows,
        rank=rank,
        chunks=partials.shape[0],
        scale=scale,
        stride_partial=rows * rank,
        stride_hidden_row=hidden.stride(0),
        SHARED_GATE=shared,
        **config,
        **gate_arguments(gate),
    )
    if gate is not None and dgate is not None:
        dgate = sum_chunks(dgate, gate.shape, 1.0, gate.dtype) if shared else dgate.view(gate.shape)
    return dhidden, dgate
