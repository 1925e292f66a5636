"""Circular convolution in Triton: the steps between the spectra, and the dense matrix; products are torch's.

Which way a call takes is decided in `peftk/kernels/shared/circulant.py`, which also says what a spectrum is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.shared.circulant import Paths, Transforms, operators
from ..kernels.shared.wide import wide_product
from ._launch import launch, unsupported

MAX_CHUNKS = 32
"""How many pieces the rows are cut into for the gradient of a kernel, at most."""


@triton.jit
def _circulant_mix_kernel(
    x_ptr,
    planes_ptr,
    out_ptr,
    rows,
    from_blocks,
    to_blocks,
    lanes,
    lane_tiles,
    to_tiles,
    stride_x_row,
    stride_x_block,
    stride_out_row,
    stride_out_block,
    stride_planes_from,
    stride_planes_to,
    ADJOINT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TO: tl.constexpr,
    BLOCK_LANES: tl.constexpr,
):
    """Write the spectrum of the convolution for a tile of rows, of blocks of the output, and of lanes."""
    # All on the first axis: the others end at 65,535 programs, and there may be more rows.
    program = tl.program_id(0)
    lane = (program % lane_tiles * BLOCK_LANES + tl.arange(0, BLOCK_LANES))[None, None, :]  # [1, 1, BLOCK_LANES]
    to = (program // lane_tiles % to_tiles * BLOCK_TO + tl.arange(0, BLOCK_TO))[None, :, None]  # [1, BLOCK_TO, 1]
    tile = (program // lane_tiles // to_tiles).to(tl.int64)
    row = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None, None]  # [BLOCK_ROWS, 1, 1]
    x = x_ptr + row * stride_x_row + lane  # [BLOCK_ROWS, 1, BLOCK_LANES]
    planes = planes_ptr + to * stride_planes_to + lane  # [1, BLOCK_TO, BLOCK_LANES]
    x_mask = (row < rows) & (lane < lanes)  # [BLOCK_ROWS, 1, BLOCK_LANES]
    planes_mask = (to < to_blocks) & (lane < lanes)  # [1, BLOCK_TO, BLOCK_LANES]
    real = tl.zeros((BLOCK_ROWS, BLOCK_TO, BLOCK_LANES), tl.float32)  # [BLOCK_ROWS, BLOCK_TO, BLOCK_LANES]
    imaginary = tl.zeros((BLOCK_ROWS, BLOCK_TO, BLOCK_LANES), tl.float32)  # [BLOCK_ROWS, BLOCK_TO, BLOCK_LANES]
    for n in range(from_blocks):
        x_real = tl.load(x + n * stride_x_block, mask=x_mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, 1, BLOCK_LANES]
        # [BLOCK_ROWS, 1, BLOCK_LANES]
        x_imaginary = tl.load(x + n * stride_x_block + lanes, mask=x_mask, other=0.0).to(tl.float32)
        a = tl.load(planes + n * stride_planes_from, mask=planes_mask, other=0.0)  # [1, BLOCK_TO, BLOCK_LANES]
        s = tl.load(planes + n * stride_planes_from + lanes, mask=planes_mask, other=0.0)  # [1, BLOCK_TO, BLOCK_LANES]
        # [1, BLOCK_TO, BLOCK_LANES]
        c = tl.load(planes + n * stride_planes_from + 2 * lanes, mask=planes_mask, other=0.0)
        if ADJOINT:
            real += a * x_real - s * x_imaginary
            imaginary += c * x_imaginary + s * x_real
        else:
            real += a * x_real + s * x_imaginary
            imaginary += c * x_imaginary - s * x_real
    out = out_ptr + row * stride_out_row + to * stride_out_block + lane  # [BLOCK_ROWS, BLOCK_TO, BLOCK_LANES]
    mask = (row < rows) & (to < to_blocks) & (lane < lanes)  # [BLOCK_ROWS, BLOCK_TO, BLOCK_LANES]
    tl.store(out, real.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + lanes, imaginary.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _circulant_contract_kernel(
    grad_ptr,
    x_ptr,
    partial_ptr,
    rows,
    rows_per_chunk,
    out_blocks,
    in_blocks,
    lanes,
    lane_tiles,
    in_tiles,
    stride_grad_row,
    stride_x_row,
    stride_block,
    stride_partial_chunk,
    stride_partial_out,
    stride_partial_in,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_LANES: tl.constexpr,
):
    """Write one chunk's sums of products for a tile of pairs of blocks and of lanes."""
    program = tl.program_id(0)
    lane = (program % lane_tiles * BLOCK_LANES + tl.arange(0, BLOCK_LANES))[None, None, :]  # [1, 1, BLOCK_LANES]
    ins = (program // lane_tiles % in_tiles * BLOCK_IN + tl.arange(0, BLOCK_IN))[None, :, None]  # [1, BLOCK_IN, 1]
    outs = (program // lane_tiles // in_tiles * BLOCK_OUT + tl.arange(0, BLOCK_OUT))[:, None, None]  # [BLOCK_OUT, 1, 1]
    chunk = tl.program_id(1).to(tl.int64)
    first = chunk * rows_per_chunk
    grad = grad_ptr + first * stride_grad_row + outs * stride_block + lane  # [BLOCK_OUT, 1, BLOCK_LANES]
    x = x_ptr + first * stride_x_row + ins * stride_block + lane  # [1, BLOCK_IN, BLOCK_LANES]
    grad_mask = (outs < out_blocks) & (lane < lanes)  # [BLOCK_OUT, 1, BLOCK_LANES]
    x_mask = (ins < in_blocks) & (lane < lanes)  # [1, BLOCK_IN, BLOCK_LANES]
    a = tl.zeros((BLOCK_OUT, BLOCK_IN, BLOCK_LANES), tl.float32)  # [BLOCK_OUT, BLOCK_IN, BLOCK_LANES]
    s = tl.zeros((BLOCK_OUT, BLOCK_IN, BLOCK_LANES), tl.float32)  # [BLOCK_OUT, BLOCK_IN, BLOCK_LANES]
    c = tl.zeros((BLOCK_OUT, BLOCK_IN, BLOCK_LANES), tl.float32)  # [BLOCK_OUT, BLOCK_IN, BLOCK_LANES]
    for _ in range(tl.minimum(rows_per_chunk, rows - first).to(tl.int32)):
        grad_real = tl.load(grad, mask=grad_mask, other=0.0).to(tl.float32)  # [BLOCK_OUT, 1, BLOCK_LANES]
        grad_imaginary = tl.load(grad + lanes, mask=grad_mask, other=0.0).to(tl.float32)  # [BLOCK_OUT, 1, BLOCK_LANES]
        x_real = tl.load(x, mask=x_mask, other=0.0).to(tl.float32)  # [1, BLOCK_IN, BLOCK_LANES]
        x_imaginary = tl.load(x + lanes, mask=x_mask, other=0.0).to(tl.float32)  # [1, BLOCK_IN, BLOCK_LANES]
        a += grad_real * x_real
        s += grad_real * x_imaginary - grad_imaginary * x_real
        c += grad_imaginary * x_imaginary
        grad += stride_grad_row
        x += stride_x_row
    mask = (outs < out_blocks) & (ins < in_blocks) & (lane < lanes)  # [BLOCK_OUT, BLOCK_IN, BLOCK_LANES]
    # [BLOCK_OUT, BLOCK_IN, BLOCK_LANES]
    partial = partial_ptr + chunk * stride_partial_chunk + outs * stride_partial_out + ins * stride_partial_in + lane
    tl.store(partial, a, mask=mask)
    tl.store(partial + lanes, s, mask=mask)
    tl.store(partial + 2 * lanes, c, mask=mask)


@triton.jit
def _circulant_weight_kernel(
    weight_ptr,
    kernel_ptr,
    out_ptr,
    out_features,
    in_features,
    size,
    scale,
    stride_row,
    stride_kernel_out,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Write out = weight + scale * circulant for one tile."""
    col_tiles = tl.cdiv(in_features, BLOCK_COLS)
    row = tl.program_id(0) // col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    col = tl.program_id(0) % col_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
    mask = (row < out_features)[:, None] & (col < in_features)[None, :]  # [BLOCK_ROWS, BLOCK_COLS]
    shift = (col % size)[None, :] - (row % size)[:, None]  # [BLOCK_ROWS, BLOCK_COLS]
    # The first rows of the blocks of one row of blocks lie side by side: block n starts at column n * size.
    place = (col // size * size)[None, :] + tl.where(shift < 0, shift + size, shift)  # [BLOCK_ROWS, BLOCK_COLS]
    offset = (row // size).to(tl.int64)[:, None] * stride_kernel_out  # [BLOCK_ROWS, 1]
    value = tl.load(kernel_ptr + offset + place, mask=mask, other=0.0) * scale  # [BLOCK_ROWS, BLOCK_COLS]
    at = row.to(tl.int64)[:, None] * stride_row + col[None, :]  # [BLOCK_ROWS, BLOCK_COLS]
    if HAS_WEIGHT:
        value += tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _circulant_weight_backward_kernel(
    grad_ptr,
    dkernel_ptr,
    in_blocks,
    size,
    scale,
    stride_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
):
    """Write dkernel for a tile of places of one block: sums along the wrapped diagonals of its gradient."""
    block = tl.program_id(0)
    place = tl.program_id(1) * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)  # [BLOCK_PLACES]
    start = (block // in_blocks).to(tl.int64) * size * stride_row + block % in_blocks * size
    total = tl.zeros((BLOCK_ROWS, BLOCK_PLACES), tl.float32)  # [BLOCK_ROWS, BLOCK_PLACES]
    for first in range(0, size, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        col = row[:, None] + place[None, :]  # [BLOCK_ROWS, BLOCK_PLACES]
        col = tl.where(col >= size, col - size, col)
        mask = (row < size)[:, None] & (place < size)[None, :]  # [BLOCK_ROWS, BLOCK_PLACES]
        at = start + row.to(tl.int64)[:, None] * stride_row + col  # [BLOCK_ROWS, BLOCK_PLACES]
        total += tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at = block.to(tl.int64) * size + place  # [BLOCK_PLACES]
    tl.store(dkernel_ptr + at, tl.sum(total, 0) * scale, mask=place < size)


def _lanes_of_a_tile(lanes: int, most: int) -> int:
    return min(triton.next_power_of_2(lanes), most)


def _mix_config(lanes: int, to_blocks: int) -> dict[str, int]:
    """Return the fastest tile of some twenty timed on an H200 (8192 rows, 32 x 32 blocks of 128, bfloat16)."""
    return {
        "BLOCK_ROWS": 4,
        "BLOCK_TO": min(triton.next_power_of_2(to_blocks), 8),
        "BLOCK_LANES": _lanes_of_a_tile(lanes, 64),
        "num_warps": 2,
    }


def _contract_config(lanes: int, out_blocks: int, in_blocks: int) -> dict[str, int]:
    """Return the fastest tile of some twenty timed as those of `_mix_config`."""
    return {
        "BLOCK_OUT": min(triton.next_power_of_2(out_blocks), 4),
        "BLOCK_IN": min(triton.next_power_of_2(in_blocks), 8),
        "BLOCK_LANES": _lanes_of_a_tile(lanes, 32),
        "num_warps": 2,
    }


def _write_config() -> dict[str, int]:
    """Return the tile of a weight, 16 elements for a thread; no timing picked it."""
    return {"BLOCK_ROWS": 16, "BLOCK_COLS": 128, "num_warps": 4}


def _gather_config(size: int) -> dict[str, int]:
    """Return the tile of a block's gradient, 16 elements for a thread; no timing picked it."""
    return {"BLOCK_ROWS": 16, "BLOCK_PLACES": min(triton.next_power_of_2(size), 128), "num_warps": 4}


def _mix(spectrum: Tensor, planes: Tensor, adjoint: bool) -> Tensor:
    out_blocks, in_blocks, _, lanes = planes.shape
    (from_blocks, to_blocks) = (out_blocks, in_blocks) if adjoint else (in_blocks, out_blocks)
    rows = spectrum.shape[0]
    out = torch.empty(rows, to_blocks * 2 * lanes, dtype=spectrum.dtype, device=spectrum.device)
    config = _mix_config(lanes, to_blocks)
    lane_tiles, to_tiles = triton.cdiv(lanes, config["BLOCK_LANES"]), triton.cdiv(to_blocks, config["BLOCK_TO"])
    launch(
        _circulant_mix_kernel,
        (lane_tiles * to_tiles * triton.cdiv(rows, config["BLOCK_ROWS"]),),
        x_ptr=spectrum,
        planes_ptr=planes,
        out_ptr=out,
        rows=rows,
        from_blocks=from_blocks,
        to_blocks=to_blocks,
        lanes=lanes,
        lane_tiles=lane_tiles,
        to_tiles=to_tiles,
        stride_x_row=spectrum.shape[1],
        stride_x_block=2 * lanes,
        stride_out_row=out.shape[1],
        stride_out_block=2 * lanes,
        stride_planes_from=planes.stride(0 if adjoint else 1),
        stride_planes_to=planes.stride(1 if adjoint else 0),
        ADJOINT=adjoint,
        **config,
    )
    return out


def _contract(grad: Tensor, x: Tensor, lanes: int) -> Tensor:
    rows, out_blocks, in_blocks = grad.shape[0], grad.shape[1] // (2 * lanes), x.shape[1] // (2 * lanes)
    config = _contract_config(lanes, out_blocks, in_blocks)
    lane_tiles, in_tiles = triton.cdiv(lanes, config["BLOCK_LANES"]), triton.cdiv(in_blocks, config["BLOCK_IN"])
    tiles = lane_tiles * in_tiles * triton.cdiv(out_blocks, config["BLOCK_OUT"])
    chunks = max(1, min(MAX_CHUNKS, triton.cdiv(rows, 64), triton.cdiv(2048, tiles)))
    per_chunk = triton.cdiv(rows, chunks)
    chunks = triton.cdiv(rows, per_chunk)
    partial = torch.empty(chunks, out_blocks, in_blocks, 3, lanes, dtype=torch.float32, device=x.device)
    launch(
        _circulant_contract_kernel,
        (tiles, chunks),
        grad_ptr=grad,
        x_ptr=x,
        partial_ptr=partial,
        rows=rows,
        rows_per_chunk=per_chunk,
        out_blocks=out_blocks,
        in_blocks=in_blocks,
        lanes=lanes,
        lane_tiles=lane_tiles,
        in_tiles=in_tiles,
        stride_grad_row=grad.shape[1],
        stride_x_row=x.shape[1],
        stride_block=2 * lanes,
        stride_partial_chunk=partial.stride(0),
        stride_partial_out=partial.stride(1),
        stride_partial_in=partial.stride(2),
        **config,
    )
    return partial[0] if chunks == 1 else partial.sum(0)


def _write(weight: Tensor | None, kernel: Tensor, scale: float, out: Tensor) -> None:
    out_features, in_features = out.shape
    config = _write_config()
    launch(
        _circulant_weight_kernel,
        (triton.cdiv(in_features, config["BLOCK_COLS"]) * triton.cdiv(out_features, config["BLOCK_ROWS"]),),
        weight_ptr=out if weight is None else weight,
        kernel_ptr=kernel,
        out_ptr=out,
        out_features=out_features,
        in_features=in_features,
        size=kernel.shape[2],
        scale=scale,
        stride_row=in_features,
        stride_kernel_out=kernel.stride(0),
        HAS_WEIGHT=weight is not None,
        **config,
    )


def _gather(grad: Tensor, scale: float, dkernel: Tensor) -> None:
    out_blocks, in_blocks, size = dkernel.shape
    config = _gather_config(size)
    launch(
        _circulant_weight_backward_kernel,
        (out_blocks * in_blocks, triton.cdiv(size, config["BLOCK_PLACES"])),
        grad_ptr=grad,
        dkernel_ptr=dkernel,
        in_blocks=in_blocks,
        size=size,
        scale=scale,
        stride_row=grad.shape[1],
        **config,
    )


# The kernels that the registry looks for here by name; what a backend has of its own are the steps above.
globals().update(operators(Paths(_mix, _contract, _write, _gather, Transforms(), wide_product), unsupported))
