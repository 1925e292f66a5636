"""LoHa's Hadamard product written into a weight in Triton, and its gradient: one kernel for all four factors, called
with other strides. The products of the factors, which are small and stay in their own dtype, are computed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.shared.hadamard import Needs
from ._launch import launch
from .khatri_rao import (
    contiguous,
    khatri_rao,
    khatri_rao_backward,
    khatri_rao_backward_supports,
    khatri_rao_supports,
    reason,
)
from .low_rank_gradients import sum_chunks

__all__ = [
    "hadamard_weight",
    "hadamard_weight_backward",
    "hadamard_weight_backward_supports",
    "hadamard_weight_supports",
    "khatri_rao",
    "khatri_rao_backward",
    "khatri_rao_backward_supports",
    "khatri_rao_supports",
]

PROGRAMS = 512
"""Programs that a gradient aims at: a few for each multiprocessor of a large GPU."""


@triton.jit
def _product(
    a_ptr,
    b_ptr,
    row,
    column,
    rows,
    columns,
    rank,
    stride_a_row,
    stride_a_rank,
    stride_b_column,
    stride_b_rank,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Return a tile of the product of two factors in float32; the rank is a loop, so that any fits in registers."""
    result = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    for i in range(0, rank):
        a = tl.load(a_ptr + row * stride_a_row + i * stride_a_rank, mask=row < rows, other=0.0)  # [BLOCK_ROWS]
        # [BLOCK_COLUMNS]
        b = tl.load(b_ptr + column * stride_b_column + i * stride_b_rank, mask=column < columns, other=0.0)
        result += a.to(tl.float32)[:, None] * b.to(tl.float32)[None, :]
    return result


@triton.jit
def _hadamard_weight_kernel(
    out_ptr,
    weight_ptr,
    w1_a_ptr,
    w1_b_ptr,
    w2_a_ptr,
    w2_b_ptr,
    rows,
    features,
    r1,
    r2,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """Write out = weight + scale * (w1_a @ w1_b) * (w2_a @ w2_b) for one tile; everything is contiguous."""
    tiles = tl.cdiv(features, BLOCK_FEATURES)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)  # [BLOCK_FEATURES]
    first = _product(
        w1_a_ptr, w1_b_ptr, row, column, rows, features, r1, r1, 1, 1, features, BLOCK_ROWS, BLOCK_FEATURES
    )  # [BLOCK_ROWS, BLOCK_FEATURES]
    second = _product(
        w2_a_ptr, w2_b_ptr, row, column, rows, features, r2, r2, 1, 1, features, BLOCK_ROWS, BLOCK_FEATURES
    )  # [BLOCK_ROWS, BLOCK_FEATURES]
    mask = (row[:, None] < rows) & (column[None, :] < features)  # [BLOCK_ROWS, BLOCK_FEATURES]
    at = row[:, None] * features + column[None, :]  # [BLOCK_ROWS, BLOCK_FEATURES]
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_FEATURES]
    delta = first * second * scale  # [BLOCK_ROWS, BLOCK_FEATURES]
    # -0.0 + 0.0 is +0.0: where nothing is added, every bit of the weight stays.
    result = tl.where(delta == 0.0, weight, weight + delta)  # [BLOCK_ROWS, BLOCK_FEATURES]
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hadamard_gradient_kernel(
    partials_ptr,
    grad_ptr,
    b_ptr,
    other_a_ptr,
    other_b_ptr,
    rows,
    columns,
    rank,
    other_rank,
    chunk_columns,
    scale,
    stride_partial_row,
    stride_partial_rank,
    stride_grad_row,
    stride_grad_column,
    stride_b_column,
    stride_b_rank,
    stride_other_a_row,
    stride_other_a_rank,
    stride_other_b_column,
    stride_other_b_rank,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum (scale * grad * (other_a @ other_b)) @ b.T over a chunk of columns, for one tile of rows and of the rank.

    That is the gradient in the factor a of one pair, and, with rows and columns exchanged, in its factor b.
    """
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    rank_tiles = tl.cdiv(rank, BLOCK_RANK)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    # [BLOCK_RANK]
    ranks = (tl.program_id(0) // tiles % rank_tiles).to(tl.int64) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    chunk = (tl.program_id(0) // (tiles * rank_tiles)).to(tl.int64)
    dtype = grad_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)  # [BLOCK_ROWS, BLOCK_RANK]
    for start in tl.range(0, chunk_columns, BLOCK_COLUMNS, num_stages=1):
        column = chunk * chunk_columns + start + tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
        other = _product(
            other_a_ptr,
            other_b_ptr,
            row,
            column,
            rows,
            columns,
            other_rank,
            stride_other_a_row,
            stride_other_a_rank,
            stride_other_b_column,
            stride_other_b_rank,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )  # [BLOCK_ROWS, BLOCK_COLUMNS]
        grad = tl.load(
            grad_ptr + row[:, None] * stride_grad_row + column[None, :] * stride_grad_column,
            mask=(row[:, None] < rows) & (column[None, :] < columns),
            other=0.0,
        )  # [BLOCK_ROWS, BLOCK_COLUMNS]
        b = tl.load(
            b_ptr + column[:, None] * stride_b_column + ranks[None, :] * stride_b_rank,
            mask=(column[:, None] < columns) & (ranks[None, :] < rank),
            other=0.0,
        )  # [BLOCK_COLUMNS, BLOCK_RANK]
        scaled = (grad.to(tl.float32) * scale * other).to(dtype)  # [BLOCK_ROWS, BLOCK_COLUMNS]
        total = tl.dot(scaled, b.to(dtype), total, input_precision="ieee")
    tl.store(
        partials_ptr + chunk * rows * rank + row[:, None] * stride_partial_row + ranks[None, :] * stride_partial_rank,
        total,
        mask=(row[:, None] < rows) & (ranks[None, :] < rank),
    )


def _weight_config() -> dict[str, int]:
    """Return the tile of a weight: 128 columns are whole cache lines of every row; no timing picked it."""
    return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 128, "num_warps": 4}


def _gradient_config(rank: int, half: bool) -> dict[str, int]:
    """Return the tile of a gradient, which holds `_product` in float32 beside its sums; no timing picked it.

    float32 tiles stay below 64 rows: from there on Triton 3.7 may compute an "ieee" dot in tf32 on sm_100.
    """
    block_rank = 32 if half and rank > 16 else 16
    return {"BLOCK_RANK": block_rank, "BLOCK_ROWS": 64 if half else 32, "BLOCK_COLUMNS": 32, "num_warps": 4}


def hadamard_weight_supports(weight: Tensor, w1_a: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot write the weight."""
    return reason(weight, w1_a)


def hadamard_weight(weight: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float) -> Tensor:
    """Return ``weight + scale * (w1_a @ w1_b) * (w2_a @ w2_b)``; see `peftk.functional.hadamard_weight`."""
    weight = weight.contiguous()
    w1_a, w1_b, w2_a, w2_b = contiguous(w1_a, w1_b, w2_a, w2_b)
    (rows, r1), r2, features = w1_a.shape, w2_a.shape[1], w1_b.shape[1]
    out = torch.empty_like(weight)
    config = _weight_config()
    launch(
        _hadamard_weight_kernel,
        (triton.cdiv(rows, config["BLOCK_ROWS"]) * triton.cdiv(features, config["BLOCK_FEATURES"]),),
        out_ptr=out,
        weight_ptr=weight,
        w1_a_ptr=w1_a,
        w1_b_ptr=w1_b,
        w2_a_ptr=w2_a,
        w2_b_ptr=w2_b,
        rows=rows,
        features=features,
        r1=r1,
        r2=r2,
        scale=scale,
        **config,
    )
    return out


def hadamard_weight_backward_supports(grad: Tensor, w1_a: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return reason(grad, w1_a)


def hadamard_weight_backward(
    grad: Tensor,
    w1_a: Tensor,
    w1_b: Tensor,
    w2_a: Tensor,
    w2_b: Tensor,
    scale: float,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in the four factors; an empty tensor for one not needed."""
    need = Needs(*needs)
    w1_a, w1_b, w2_a, w2_b = contiguous(w1_a, w1_b, w2_a, w2_b)
    grad = grad.contiguous().view(w1_a.shape[0], w1_b.shape[1])
    empty = w1_a.new_empty(0)
    return (
        _gradient(grad, w1_b.mT, w2_a, w2_b.mT, scale) if need.w1_a else empty,
        _gradient(grad.mT, w1_a, w2_b.mT, w2_a, scale).mT if need.w1_b else empty,
        _gradient(grad, w2_b.mT, w1_a, w1_b.mT, scale) if need.w2_a else empty,
        _gradient(grad.mT, w2_a, w1_b.mT, w1_a, scale).mT if need.w2_b else empty,
    )


def _gradient(grad: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor, scale: float) -> Tensor:
    """Return ``(scale * grad * (other_a @ other_b.T)) @ b``, laid out as b is: rank first or last."""
    (rows, columns), rank, half = grad.shape, b.shape[1], grad.dtype is not torch.float32
    config = _gradient_config(rank, half)
    tiles = triton.cdiv(rows, config["BLOCK_ROWS"]) * triton.cdiv(rank, config["BLOCK_RANK"])
    column_tiles = triton.cdiv(columns, config["BLOCK_COLUMNS"])
    # From the shape alone: equal calls add in equal order.
    per_chunk = triton.cdiv(column_tiles, max(PROGRAMS // max(tiles, 1), 1))
    chunks = triton.cdiv(column_tiles, max(per_chunk, 1))
    rank_last = grad.stride(1) == 1
    partials = grad.new_empty(chunks, *((rows, rank) if rank_last else (rank, rows)), dtype=torch.float32)
    launch(
        _hadamard_gradient_kernel,
        (tiles * chunks,),
        partials_ptr=partials,
        grad_ptr=grad,
        b_ptr=b,
        other_a_ptr=other_a,
        other_b_ptr=other_b,
        rows=rows,
        columns=columns,
        rank=rank,
        other_rank=other_a.shape[1],
        chunk_columns=per_chunk * config["BLOCK_COLUMNS"],
        scale=scale,
        stride_partial_row=rank if rank_last else 1,
        stride_partial_rank=1 if rank_last else rows,
        stride_grad_row=grad.stride(0),
        stride_grad_column=grad.stride(1),
        stride_b_column=b.stride(0),
        stride_b_rank=b.stride(1),
        stride_other_a_row=other_a.stride(0),
        stride_other_a_rank=other_a.stride(1),
        stride_other_b_column=other_b.stride(0),
        stride_other_b_rank=other_b.stride(1),
        **config,
    )
    found = sum_chunks(partials, partials.shape[1:], 1.0, b.dtype)
    return found if rank_last else found.mT
