"""The kernels that write a weight with a Kronecker product added, and how they are launched."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from .kronecker_products import power


@triton.jit
def _kronecker_weight_kernel(
    out_ptr,
    weight_ptr,
    w1_ptr,
    w2_ptr,
    middle,
    rows,
    columns,
    row_tiles,
    column_tiles,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write out = weight + scale * kron(w1, w2), one tile of one block a program."""
    program = tl.program_id(0).to(tl.int64)
    columns_at = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    rows_at = program // column_tiles % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    block = program // column_tiles // row_tiles
    mask = (rows_at < rows)[:, None] & (columns_at < columns)[None, :]  # [BLOCK_ROWS, BLOCK_COLUMNS]
    factor = tl.load(w1_ptr + block)  # [], one number
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    w2 = tl.load(w2_ptr + rows_at[:, None] * columns + columns_at[None, :], mask=mask, other=0.0)
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    offsets = ((block // middle * rows + rows_at)[:, None] * middle + block % middle) * columns + columns_at[None, :]
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(w2.dtype)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    delta = factor * scale * w2  # [BLOCK_ROWS, BLOCK_COLUMNS]
    result = tl.where(delta == 0.0, weight, weight + delta)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _kronecker_weight_backward_kernel(
    grad_ptr,
    w1_ptr,
    w2_ptr,
    dw1_ptr,
    dw2_ptr,
    left,
    middle,
    rows,
    columns,
    tiles,
    column_tiles,
    left_per_chunk,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NEED_W1: tl.constexpr,
    NEED_W2: tl.constexpr,
):
    """Compute parts of dw1 and dw2 for one tile of w2 and a chunk of the rows of w1.

    dw1 is (tiles, left, middle), dw2 is (chunks, rows, columns); the gradient is read once.
    """
    program = tl.program_id(0).to(tl.int64)
    tile, chunk = program % tiles, program // tiles
    columns_at = tile % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    rows_at = tile // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    mask = (rows_at < rows)[:, None] & (columns_at < columns)[None, :]  # [BLOCK_ROWS, BLOCK_COLUMNS]
    small = rows_at[:, None] * columns + columns_at[None, :]  # [BLOCK_ROWS, BLOCK_COLUMNS]
    w2 = tl.load(w2_ptr + small, mask=mask, other=0.0)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    first = chunk * left_per_chunk * middle
    last = tl.minimum(first + left_per_chunk * middle, left * middle)
    for block in range(first, last):
        offsets = ((block // middle * rows + rows_at)[:, None] * middle + block % middle) * columns  # [BLOCK_ROWS, 1]
        # [BLOCK_ROWS, BLOCK_COLUMNS]
        grad = tl.load(grad_ptr + offsets + columns_at[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEED_W1:
            tl.store(dw1_ptr + tile * left * middle + block, tl.sum(grad * w2))
        if NEED_W2:
            sums += grad * tl.load(w1_ptr + block)
    if NEED_W2:
        tl.store(dw2_ptr + chunk * rows * columns + small, sums, mask=mask)


def _weight_config(rows: int, columns: int) -> dict[str, int]:
    """Return the tile of w2, 16 elements for a thread, which no timing picked."""
    block_columns = power(columns, 1, 128)
    return {"BLOCK_ROWS": power(rows, 1, 2048 // block_columns), "BLOCK_COLUMNS": block_columns, "num_warps": 4}


def write_weight(weight: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """Return ``weight + scale * kron(w1, w2)``; everything is contiguous."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    rows, columns = w2.shape
    config = _weight_config(rows, columns)
    row_tiles, column_tiles = triton.cdiv(rows, config["BLOCK_ROWS"]), triton.cdiv(columns, config["BLOCK_COLUMNS"])
    launch(
        _kronecker_weight_kernel,
        (w1.numel() * row_tiles * column_tiles,),
        out_ptr=out,
        weight_ptr=weight,
        w1_ptr=w1,
        w2_ptr=w2,
        middle=w1.shape[1],
        rows=rows,
        columns=columns,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        scale=scale,
        **config,
    )
    return out


def weight_gradients(
    grad: Tensor, w1: Tensor, w2: Tensor, scale: float, need_w1: bool, need_w2: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients in w1 and w2; an empty tensor for one not needed."""
    (left, middle), (rows, columns) = w1.shape, w2.shape
    config = _weight_config(rows, columns)
    column_tiles = triton.cdiv(columns, config["BLOCK_COLUMNS"])
    tiles = triton.cdiv(rows, config["BLOCK_ROWS"]) * column_tiles
    # As many parts of dw2 as keep them together far smaller than the weight.
    per_chunk = triton.cdiv(left, max(1, min(left, middle, 8)))
    chunks = triton.cdiv(left, per_chunk)
    dw1 = torch.empty((tiles, left, middle) if need_w1 else (0,), dtype=torch.float32, device=grad.device)
    dw2 = torch.empty((chunks, rows, columns) if need_w2 else (0,), dtype=torch.float32, device=grad.device)
    if need_w1 or need_w2:
        launch(
            _kronecker_weight_backward_kernel,
            (tiles * chunks,),
            grad_ptr=grad,
            w1_ptr=w1,
            w2_ptr=w2,
            dw1_ptr=dw1,
            dw2_ptr=dw2,
            left=left,
            middle=middle,
            rows=rows,
            columns=columns,
            tiles=tiles,
            column_tiles=column_tiles,
            left_per_chunk=per_chunk,
            **config,
            NEED_W1=need_w1,
            NEED_W2=need_w2,
        )
    return dw1.sum(0) * scale if need_w1 else dw1, dw2.sum(0) * scale if need_w2 else dw2
