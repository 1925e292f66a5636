"""Block rotation in Triton: activations keep their layout, and one pass over (x, grad) gives both gradients.

The columns are cut into tiles. A tile holds as many whole blocks as fit, so that blocks too small for a matrix
instruction become one block-diagonal matrix; a block above `RESIDENT_WIDTH` is a tile of its own, and its matrix is
read again for every tile of rows instead of being kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.shared.block_diagonal import linear_backward
from ._launch import launch, unsupported

MAX_SIZE = 256
"""Largest block: a wider gradient tile does not fit in registers."""

RESIDENT_WIDTH = 64
"""Widest tile whose matrix stays in registers or shared memory while rows stream past."""


@dataclass(frozen=True)
class Tiling:
    """How one program walks over a matrix: see `_forward_tiling` and `_backward_tiling`."""

    pack: int
    width: int
    block_cols: int
    block_k: int
    block_rows: int
    programs: int
    num_warps: int

    @property
    def in_place(self) -> bool:
        """Whether no program reads columns of grad that another one overwrites with dx."""
        return self.block_cols == self.width

    def chunks(self, rows: int, tiles: int) -> tuple[int, int]:
        """Return the number of chunks that the rows are cut into, and of row tiles in each."""
        row_tiles = triton.cdiv(rows, self.block_rows)
        per_chunk = triton.cdiv(row_tiles, max(self.programs // tiles, 1))
        return triton.cdiv(row_tiles, per_chunk), per_chunk


def _width(size: int, half: bool) -> int:
    # 64 half-precision columns are 128 bytes of every row: one cache line. float32 products have no matrix
    # instruction, so that every padded column costs time there.
    return max(triton.next_power_of_2(size), RESIDENT_WIDTH if half else 16)


def _forward_tiling(rows: int, size: int, dtype: torch.dtype) -> Tiling:
    half = dtype is not torch.float32
    width = _width(size, half)
    if width <= RESIDENT_WIDTH:
        block_rows = 128 if half else min(2048 // width, 64)
        return Tiling(width // size, width, width, width, 16 if rows <= 16 else block_rows, 1024, 4)
    if half:
        return Tiling(1, width, 128, 64, 16 if rows <= 16 else 128, 1 << 31, 8)
    return Tiling(1, width, 64, 16, 16 if rows <= 16 else 64, 1 << 31, 4)


def _backward_tiling(rows: int, size: int, dtype: torch.dtype) -> Tiling:
    half = dtype is not torch.float32
    width = _width(size, half)
    if width <= RESIDENT_WIDTH:
        block_rows = 64 if half or width == 16 else 16
        # What fits in registers without a spill was tried: the masks of odd sizes take registers of their own.
        if half and (rows <= 16 or width % size):
            block_rows = 32
        return Tiling(width // size, width, width, width, block_rows, 512, 4)
    if half:
        cols, k = (128, 64) if width == 128 else (64, 32)
        return Tiling(1, width, cols, k, 16 if rows <= 16 else 64, 256, 8)
    return Tiling(1, width, 64 if width == 128 else 32, 16, 16, 256, 8)


@triton.jit
def _block_rotate_kernel(
    x_ptr,
    blocks_ptr,
    y_ptr,
    rows,
    features,
    tiles,
    tiles_per_chunk,
    stride_x_row,
    stride_y_row,
    stride_block,
    stride_block_in,
    stride_block_out,
    SIZE: tl.constexpr,
    PACK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Write y = x @ Q for one tile of columns and one chunk of rows; Q[k, n] is at k * in + n * out."""
    SPAN: tl.constexpr = PACK * SIZE
    COL_TILES: tl.constexpr = (SPAN + BLOCK_COLS - 1) // BLOCK_COLS
    dtype = x_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    first_tile = program // tiles * tiles_per_chunk
    start = tile // COL_TILES * SPAN
    cols = tile % COL_TILES * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
    ks = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    col_mask = (cols < SPAN) & (start + cols < features)  # [BLOCK_COLS]
    block_of_col = cols // SIZE  # [BLOCK_COLS]
    first_block = start // SIZE
    col_offset = (first_block + block_of_col) * stride_block + cols % SIZE * stride_block_out  # [BLOCK_COLS]
    k_mask = (ks < SPAN) & (start + ks < features)  # [BLOCK_K]
    if WIDTH == BLOCK_K:
        inside = (ks[:, None] // SIZE == block_of_col[None, :]) & col_mask[None, :]  # [BLOCK_K, BLOCK_COLS]
        resident = tl.load(
            blocks_ptr + col_offset[None, :] + (ks % SIZE)[:, None] * stride_block_in, mask=inside, other=0.0
        ).to(dtype)  # [BLOCK_K, BLOCK_COLS]
    for t in range(tiles_per_chunk):
        row = (first_tile + t) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        row_mask = (row < rows)[:, None]  # [BLOCK_ROWS, 1]
        x_row = x_ptr + row[:, None] * stride_x_row + start  # [BLOCK_ROWS, 1]
        if WIDTH == BLOCK_K:
            x = tl.load(x_row + ks[None, :], mask=row_mask & k_mask[None, :], other=0.0)  # [BLOCK_ROWS, BLOCK_K]
            acc = tl.dot(x, resident, input_precision="ieee")  # [BLOCK_ROWS, BLOCK_COLS]
        else:
            acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
            for k in range(0, SIZE, BLOCK_K):
                in_span = k + ks < SIZE  # [BLOCK_K]
                x = tl.load(x_row + (k + ks)[None, :], mask=row_mask & in_span[None, :], other=0.0)
                q = tl.load(
                    blocks_ptr + col_offset[None, :] + (k + ks)[:, None] * stride_block_in,
                    mask=in_span[:, None] & col_mask[None, :],
                    other=0.0,
                ).to(dtype)  # [BLOCK_K, BLOCK_COLS]
                acc = tl.dot(x, q, acc, input_precision="ieee")
        y = y_ptr + row[:, None] * stride_y_row + start + cols[None, :]  # [BLOCK_ROWS, BLOCK_COLS]
        tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=row_mask & col_mask[None, :])


@triton.jit
def _rotated_back(grad_row, q_ptr, row_mask, in_mask, stride_block_out, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return a tile of grad @ Q.T, where the matrix of a block does not stay in registers."""
    js = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    dx = tl.zeros((row_mask.shape[0], in_mask.shape[0]), tl.float32)  # [BLOCK_ROWS, BLOCK_COLS]
    for j in range(0, SIZE, BLOCK_K):
        in_span = j + js < SIZE  # [BLOCK_K]
        # Read again, from the cache, because a part of a tile in registers cannot be taken.
        # [BLOCK_ROWS, BLOCK_K]
        part = tl.load(grad_row + (j + js)[None, :], mask=row_mask & in_span[None, :], other=0.0)
        # [BLOCK_K, BLOCK_COLS]
        q = tl.load(q_ptr + j * stride_block_out, mask=in_span[:, None] & in_mask[None, :], other=0.0).to(part.dtype)
        dx = tl.dot(part, q, dx, input_precision="ieee")
    return dx


@triton.jit
def _block_rotate_backward_kernel(
    grad_ptr,
    x_ptr,
    blocks_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    features,
    tiles,
    tiles_per_chunk,
    stride_grad_row,
    stride_x_row,
    stride_block,
    stride_block_in,
    stride_block_out,
    stride_partial_block,
    stride_partial_in,
    stride_partial_out,
    SIZE: tl.constexpr,
    PACK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Write dx = grad @ Q.T, and this chunk's part of dQ = x.T @ grad, for one tile of the columns of x.

    dx and partial may be None. A part of dQ is laid out as the blocks are, each block in a place of its own.
    """
    SPAN: tl.constexpr = PACK * SIZE
    COL_TILES: tl.constexpr = (SPAN + BLOCK_COLS - 1) // BLOCK_COLS
    dtype = grad_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    chunk = program // tiles
    start = tile // COL_TILES * SPAN
    ins = tile % COL_TILES * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
    outs = tl.arange(0, WIDTH)  # [WIDTH]
    in_mask = (ins < SPAN) & (start + ins < features)  # [BLOCK_COLS]
    out_mask = (outs < SPAN) & (start + outs < features)  # [WIDTH]
    first_block = start // SIZE
    js = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    # [BLOCK_K, BLOCK_COLS]
    inside = ((start + js < features) & (js < SPAN))[:, None] & (ins[None, :] // SIZE == js[:, None] // SIZE)
    # (outs, ins): the transposed matrix.
    q_ptr = blocks_ptr + (
        (first_block + ins // SIZE)[None, :] * stride_block
        + (ins % SIZE)[None, :] * stride_block_in
        + (js % SIZE)[:, None] * stride_block_out
    )  # [BLOCK_K, BLOCK_COLS]
    if dx_ptr is not None and WIDTH == BLOCK_K:
        resident = tl.load(q_ptr, mask=inside & in_mask[None, :], other=0.0).to(dtype)  # [BLOCK_K, BLOCK_COLS]
    dq = tl.zeros((BLOCK_COLS, WIDTH), tl.float32)  # [BLOCK_COLS, WIDTH]
    for t in range(tiles_per_chunk):
        row = (chunk * tiles_per_chunk + t) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        row_mask = (row < rows)[:, None]  # [BLOCK_ROWS, 1]
        grad_row = grad_ptr + row[:, None] * stride_grad_row + start  # [BLOCK_ROWS, 1]
        if partial_ptr is not None or WIDTH == BLOCK_K:
            # [BLOCK_ROWS, WIDTH]
            grad = tl.load(grad_row + outs[None, :], mask=row_mask & out_mask[None, :], other=0.0)
        if partial_ptr is not None:
            x = tl.load(
                x_ptr + row[:, None] * stride_x_row + start + ins[None, :],
                mask=row_mask & in_mask[None, :],
                other=0.0,
            )  # [BLOCK_ROWS, BLOCK_COLS]
            dq = tl.dot(tl.trans(x), grad, dq, input_precision="ieee")
        if dx_ptr is not None:
            if WIDTH == BLOCK_K:
                dx = tl.dot(grad, resident, input_precision="ieee")  # [BLOCK_ROWS, BLOCK_COLS]
            else:
                dx = _rotated_back(grad_row, q_ptr, row_mask, in_mask, stride_block_out, SIZE, BLOCK_K)
            # dx may be stored over grad: no warp stores before every warp has read.
            tl.debug_barrier()
            tl.store(
                dx_ptr + row[:, None] * features + start + ins[None, :],
                dx.to(dx_ptr.dtype.element_ty),
                mask=row_mask & in_mask[None, :],
            )
    if partial_ptr is not None:
        partial = (
            partial_ptr
            + chunk * features * SIZE
            + (
                (first_block + ins // SIZE)[:, None] * stride_partial_block
                + (ins % SIZE)[:, None] * stride_partial_in
                + (outs % SIZE)[None, :] * stride_partial_out
            )
        )  # [BLOCK_COLS, WIDTH]
        diagonal = (ins[:, None] // SIZE == outs[None, :] // SIZE) & in_mask[:, None]  # [BLOCK_COLS, WIDTH]
        tl.store(partial, dq, mask=diagonal)


def _matrix(x: Tensor, features: int) -> Tensor:
    """View activations as a matrix with rows of adjacent elements; copy them if they are not."""
    x = x.reshape(-1, features)
    return x if x.stride(1) == 1 or features == 1 else x.contiguous()


def _supports(x: Tensor, blocks: Tensor) -> str | None:
    if reason := unsupported(x):
        return reason
    if blocks.shape[-1] > MAX_SIZE:
        return f"the Triton kernels rotate blocks of up to {MAX_SIZE}; got {blocks.shape[-1]}"
    return None


def block_rotate_supports(x: Tensor, blocks: Tensor, transpose: bool) -> str | None:
    """Return None, or why Triton cannot rotate x."""
    return _supports(x, blocks)


def block_rotate(x: Tensor, blocks: Tensor, transpose: bool) -> Tensor:
    """See `peftk.functional.block_rotate`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    features, size = x.shape[-1], blocks.shape[-1]
    x, out, blocks = _matrix(x, features), y.view(-1, features), blocks.contiguous()
    rows = x.shape[0]
    tiling = _forward_tiling(rows, size, x.dtype)
    span = tiling.pack * size
    tiles = triton.cdiv(features, span) * triton.cdiv(span, tiling.block_cols)
    chunks, per_chunk = tiling.chunks(rows, tiles)
    launch(
        _block_rotate_kernel,
        (tiles * chunks,),
        num_warps=tiling.num_warps,
        x_ptr=x,
        blocks_ptr=blocks,
        y_ptr=out,
        rows=rows,
        features=features,
        tiles=tiles,
        tiles_per_chunk=per_chunk,
        stride_x_row=x.stride(0),
        stride_y_row=features,
        stride_block=0 if blocks.shape[0] == 1 else size * size,
        stride_block_in=1 if transpose else size,
        stride_block_out=size if transpose else 1,
        SIZE=size,
        PACK=tiling.pack,
        WIDTH=tiling.width,
        BLOCK_ROWS=tiling.block_rows,
        BLOCK_K=tiling.block_k,
        BLOCK_COLS=tiling.block_cols,
    )
    return y


def _backward(
    grad: Tensor, x: Tensor, blocks: Tensor, transpose: bool, dx: Tensor, need_x: bool, need_blocks: bool
) -> Tensor:
    """Fill dx (empty if not needed; may be grad itself where `Tiling.in_place`); return dblocks."""
    if not need_blocks:
        dblocks = blocks.new_empty(0)
    if x.numel() == 0:
        return torch.zeros_like(blocks) if need_blocks else dblocks
    features, size = x.shape[-1], blocks.shape[-1]
    grad, x, blocks = _matrix(grad, features), _matrix(x, features), blocks.contiguous()
    rows, count = x.shape[0], features // size
    tiling = _backward_tiling(rows, size, x.dtype)
    span = tiling.pack * size
    tiles = triton.cdiv(features, span) * triton.cdiv(span, tiling.block_cols)
    chunks, per_chunk = tiling.chunks(rows, tiles)
    # A shared block has a part for each of its uses, so that nothing is added up in memory.
    partial = torch.empty(chunks, count, size, size, dtype=torch.float32, device=x.device) if need_blocks else None
    launch(
        _block_rotate_backward_kernel,
        (tiles * chunks,),
        num_warps=tiling.num_warps,
        grad_ptr=grad,
        x_ptr=x,
        blocks_ptr=blocks,
        dx_ptr=dx if need_x else None,
        partial_ptr=partial,
        rows=rows,
        features=features,
        tiles=tiles,
        tiles_per_chunk=per_chunk,
        stride_grad_row=grad.stride(0),
        stride_x_row=x.stride(0),
        stride_block=0 if blocks.shape[0] == 1 else size * size,
        stride_block_in=1 if transpose else size,
        stride_block_out=size if transpose else 1,
        stride_partial_block=size * size,
        stride_partial_in=1 if transpose else size,
        stride_partial_out=size if transpose else 1,
        SIZE=size,
        PACK=tiling.pack,
        WIDTH=tiling.width,
        BLOCK_ROWS=tiling.block_rows,
        BLOCK_K=tiling.block_k,
        BLOCK_COLS=tiling.block_cols,
    )
    if partial is None:
        return dblocks
    if blocks.shape[0] == 1:
        return partial.view(-1, 1, size, size).sum(0).to(blocks.dtype)
    return (partial[0] if chunks == 1 else partial.sum(0)).to(blocks.dtype)


def block_rotate_backward_supports(grad: Tensor, x: Tensor, blocks: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return _supports(x, blocks)


def block_rotate_backward(
    grad: Tensor, x: Tensor, blocks: Tensor, transpose: bool, need_x: bool, need_blocks: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `block_rotate` in x and in the blocks; an empty tensor for one not needed."""
    dx = torch.empty(x.shape if need_x else 0, dtype=grad.dtype, device=grad.device)
    if not (need_x or need_blocks):
        return dx, blocks.new_empty(0)
    return dx, _backward(grad, x, blocks, transpose, dx, need_x, need_blocks)


def block_rotate_linear_supports(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> str | None:
    """Return None, or why Triton cannot rotate x."""
    return _supports(x, blocks)


def block_rotate_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor:
    """See `peftk.functional.block_rotate_linear`."""
    if x.numel() // x.shape[-1] > weight.shape[0]:
        # The weight has fewer rows than x, and rotating either gives the same product.
        return linear(x, block_rotate(weight, blocks, True), bias)
    return linear(block_rotate(x, blocks, False), weight, bias)


def block_rotate_linear_backward_supports(
    grad: Tensor, x: Tensor, weight: Tensor, blocks: Tensor, *args: object
) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return _supports(x, blocks)


def _linear_backward(
    product: Tensor, x: Tensor, blocks: Tensor, need_x: bool, need_blocks: bool
) -> tuple[Tensor, Tensor]:
    # The gradient of x takes the place of the product, except where several programs read the same rows of it.
    in_place = _backward_tiling(x.numel() // x.shape[-1], blocks.shape[-1], x.dtype).in_place
    dx = product.new_empty(0) if not need_x else product if in_place else torch.empty_like(product)
    return dx, _backward(product, x, blocks, False, dx, need_x, need_blocks)


def block_rotate_linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, in the blocks and in the bias; an empty tensor for one not needed."""
    return linear_backward(_linear_backward, *args)
