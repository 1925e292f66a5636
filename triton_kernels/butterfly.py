"""Butterfly products, one launch a stage, and the scale of channels in Triton.

Block j of a chunk of 2^i blocks of stage i takes half-blocks j and j + 2^i of the chunk, and no other block does. So a
program has a block to itself, in the forward pass and in the backward pass, and no sum crosses programs. The first
stage is its own product: two stages are one launch forward and one backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.shared.butterfly import MAX_GROUP, multiply, multiply_backward, passes
from ._launch import launch, unsupported
from .block_diagonal import block_rotate, block_rotate_backward

MAX_SIZE = 256
"""Largest block of the rotation that follows."""

ROWS_OF_A_CHUNK = 512
"""The most rows that one program sums for the gradient of the scale."""


@triton.jit
def _butterfly_stage_kernel(
    factor_ptr,
    before_ptr,
    after_ptr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Write the rows of one block of a stage, over some columns of one of the two subchunks that it joins."""
    HALF: tl.constexpr = SIZE // 2
    WIDTH: tl.constexpr = INNER * HALF
    TILES: tl.constexpr = (WIDTH + BLOCK_COLS - 1) // BLOCK_COLS
    program = tl.program_id(0).to(tl.int64)
    block = program // (2 * TILES)
    sub = program // TILES % 2
    chunk = block // INNER
    first = block % INNER * HALF
    row = tl.arange(0, ROWS)  # [ROWS]
    col = (program % TILES * BLOCK_COLS).to(tl.int32) + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
    total = tl.zeros((ROWS, BLOCK_COLS), tl.float32)  # [ROWS, BLOCK_COLS]
    for start in range(0, DEPTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        left = tl.load(
            factor_ptr + block * (SIZE * SIZE) + row[:, None] * SIZE + sub * HALF + k[None, :],
            mask=(row < SIZE)[:, None] & (k < HALF)[None, :],
            other=0.0,
        )  # [ROWS, BLOCK_K]
        right = tl.load(
            before_ptr + ((2 * chunk + sub) * WIDTH + first + k[:, None]) * WIDTH + col[None, :],
            mask=(k < HALF)[:, None] & (col < WIDTH)[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_COLS]
        total = tl.dot(left, right, total, input_precision="ieee")
    after_row = chunk * (2 * WIDTH) + row // HALF * WIDTH + first + row % HALF  # [ROWS]
    tl.store(
        after_ptr + after_row[:, None] * (2 * WIDTH) + sub * WIDTH + col[None, :],
        total,
        mask=(row < SIZE)[:, None] & (col < WIDTH)[None, :],
    )


@triton.jit
def _butterfly_stage_backward_kernel(
    factor_ptr,
    before_ptr,
    grad_ptr,
    dfactor_ptr,
    dbefore_ptr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Write the gradients of half the columns of one block, and of the rows of the subchunk that they multiply."""
    HALF: tl.constexpr = SIZE // 2
    WIDTH: tl.constexpr = INNER * HALF
    program = tl.program_id(0).to(tl.int64)
    block = program // 2
    sub = program % 2
    chunk = block // INNER
    first = block % INNER * HALF
    row = tl.arange(0, ROWS)  # [ROWS]
    k = tl.arange(0, DEPTH)  # [DEPTH]
    entry = block * (SIZE * SIZE) + row[:, None] * SIZE + sub * HALF + k[None, :]  # [ROWS, DEPTH]
    inside = (row < SIZE)[:, None] & (k < HALF)[None, :]  # [ROWS, DEPTH]
    factor = tl.load(factor_ptr + entry, mask=inside, other=0.0)  # [ROWS, DEPTH]
    grad_row = chunk * (2 * WIDTH) + row // HALF * WIDTH + first + row % HALF  # [ROWS]
    dfactor = tl.zeros((ROWS, DEPTH), tl.float32)  # [ROWS, DEPTH]
    for start in range(0, WIDTH, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
        grad = tl.load(
            grad_ptr + grad_row[:, None] * (2 * WIDTH) + sub * WIDTH + col[None, :],
            mask=(row < SIZE)[:, None] & (col < WIDTH)[None, :],
            other=0.0,
        )  # [ROWS, BLOCK_COLS]
        before_entry = ((2 * chunk + sub) * WIDTH + first + k[:, None]) * WIDTH + col[None, :]  # [DEPTH, BLOCK_COLS]
        before_mask = (k < HALF)[:, None] & (col < WIDTH)[None, :]  # [DEPTH, BLOCK_COLS]
        before = tl.load(before_ptr + before_entry, mask=before_mask, other=0.0)  # [DEPTH, BLOCK_COLS]
        dfactor = tl.dot(grad, tl.trans(before), dfactor, input_precision="ieee")
        dbefore = tl.dot(tl.trans(factor), grad, input_precision="ieee")  # [DEPTH, BLOCK_COLS]
        tl.store(dbefore_ptr + before_entry, dbefore, mask=before_mask)
    tl.store(dfactor_ptr + entry, dfactor, mask=inside)


@triton.jit
def _offsets(rows, channel, stride_outer, inner, INNER_ONE: tl.constexpr):
    """Return where x (outer, channels, inner) holds a channel; rows number (outer, inner)."""
    if INNER_ONE:
        return rows[:, None].to(tl.int64) * stride_outer + channel[None, :]
    return (rows // inner).to(tl.int64)[:, None] * stride_outer + (rows % inner)[:, None] + channel[None, :] * inner


@triton.jit
def _scale_channels_kernel(
    x_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    rows,
    channels,
    stride_outer,
    inner,
    INNER_ONE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Write scale * x + (1 - scale) * bias for a tile of rows and channels."""
    tiles = tl.cdiv(channels, BLOCK_COLS)
    program = tl.program_id(0)
    channel = program % tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
    row = program // tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    scale = tl.load(scale_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)  # [BLOCK_COLS]
    mask = (row < rows)[:, None] & (channel < channels)[None, :]  # [BLOCK_ROWS, BLOCK_COLS]
    at = _offsets(row, channel, stride_outer, inner, INNER_ONE)  # [BLOCK_ROWS, BLOCK_COLS]
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :]  # [BLOCK_ROWS, BLOCK_COLS]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)  # [BLOCK_COLS]
        # A scale of one must change no bit, and a negative zero added changes none.
        y += tl.where(scale == 1.0, -0.0, (1.0 - scale) * bias)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_channels_backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    channels,
    stride_outer,
    inner,
    INNER_ONE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Write dx for a chunk of rows and a tile of channels, and the chunk's sums of grad * (x - bias) and of grad."""
    tiles = tl.cdiv(channels, BLOCK_COLS)
    program = tl.program_id(0)
    channel = program % tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
    inside = channel < channels  # [BLOCK_COLS]
    scale = tl.load(scale_ptr + channel, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_COLS]
    bias = tl.zeros((BLOCK_COLS,), tl.float32)  # [BLOCK_COLS]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    product = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)  # [BLOCK_ROWS, BLOCK_COLS]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)  # [BLOCK_ROWS, BLOCK_COLS]
    for start in range(0, CHUNK, BLOCK_ROWS):
        row = program // tiles * CHUNK + start + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        mask = (row < rows)[:, None] & inside[None, :]  # [BLOCK_ROWS, BLOCK_COLS]
        at = _offsets(row, channel, stride_outer, inner, INNER_ONE)  # [BLOCK_ROWS, BLOCK_COLS]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_COLS]
        if NEED_SUMS:
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_COLS]
            # Where the mask is off, grad is zero.
            product += grad * (x - bias[None, :])
            total += grad
        if NEED_X:
            tl.store(dx_ptr + at, (grad * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)
    if NEED_SUMS:
        to = partial_ptr + (program // tiles).to(tl.int64) * (2 * channels) + channel  # [BLOCK_COLS]
        tl.store(to, tl.sum(product, 0), mask=inside)
        tl.store(to + channels, tl.sum(total, 0), mask=inside)


def _power(number: int, least: int) -> int:
    return max(triton.next_power_of_2(number), least)


def _stage_config(size: int, width: int) -> dict[str, int]:
    """Return the tile of a stage: a block's rows, and no more columns than fit in registers; no timing picked it."""
    rows, cols, depth = _power(size, 16), min(_power(width, 16), 64), _power(size // 2, 16)
    warps = 1 if rows * cols <= 256 else 4
    return {"ROWS": rows, "DEPTH": depth, "BLOCK_K": min(depth, 16), "BLOCK_COLS": cols, "num_warps": warps}


def _stage_backward_config(size: int) -> dict[str, int]:
    """Return the tile of a stage's gradients, which holds half of a block in registers; no timing picked it."""
    rows = _power(size, 16)
    warps = 1 if rows <= 16 else 4 if rows <= 64 else 8
    return {"ROWS": rows, "DEPTH": _power(size // 2, 16), "BLOCK_COLS": 16, "num_warps": warps}


def _stage(factor: Tensor, before: Tensor, stage: int) -> Tensor:
    """Return the product of the stages up to one, from that of the stages before it."""
    count, size, _ = factor.shape
    width = size << (stage - 1)
    after = factor.new_empty(count >> stage, 2 * width, 2 * width)
    config = _stage_config(size, width)
    launch(
        _butterfly_stage_kernel,
        (count * 2 * triton.cdiv(width, config["BLOCK_COLS"]),),
        factor_ptr=factor,
        before_ptr=before,
        after_ptr=after,
        SIZE=size,
        INNER=1 << stage,
        **config,
    )
    return after


def _stage_backward(factor: Tensor, before: Tensor, grad: Tensor, dfactor: Tensor, dbefore: Tensor, stage: int) -> None:
    """Fill the gradients of a stage and of the product before it."""
    count, size, _ = factor.shape
    launch(
        _butterfly_stage_backward_kernel,
        (count * 2,),
        factor_ptr=factor,
        before_ptr=before,
        grad_ptr=grad,
        dfactor_ptr=dfactor,
        dbefore_ptr=dbefore,
        SIZE=size,
        INNER=1 << stage,
        **_stage_backward_config(size),
    )


def _supports(factors: Tensor, stages: int) -> str | None:
    if factors.dtype is not torch.float32:
        return f"the Triton kernels take float32 factors; got {factors.dtype}"
    if (size := factors.shape[-1]) << (stages - 1) > MAX_GROUP and stages > 1:
        return f"the Triton kernels take groups of up to {MAX_GROUP} features; got {size << (stages - 1)}"
    return unsupported(factors)


def butterfly_compose_supports(factors: Tensor) -> str | None:
    """Return None, or why Triton cannot multiply the stages out."""
    return _supports(factors, len(factors))


def _products(factors: Tensor) -> list[Tensor]:
    found = [factors[0]]
    for stage in range(1, len(factors)):
        found.append(_stage(factors[stage], found[-1], stage))
    return found


def butterfly_compose(factors: Tensor) -> Tensor:
    """See `peftk.functional.butterfly_compose`."""
    factors = factors.contiguous()
    return _products(factors)[-1] if len(factors) > 1 else factors[0].clone()


def butterfly_compose_backward_supports(grad: Tensor, factors: Tensor) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return _supports(factors, len(factors))


def butterfly_compose_backward(grad: Tensor, factors: Tensor) -> Tensor:
    """Return the gradient of `butterfly_compose` in the factors."""
    factors, grad = factors.contiguous(), grad.contiguous()
    if len(factors) == 1:
        return grad.clone()[None]
    dfactors, before = torch.empty_like(factors), _products(factors[:-1])
    for stage in range(len(factors) - 1, 0, -1):
        dbefore = dfactors[0] if stage == 1 else torch.empty_like(before[stage - 1])
        _stage_backward(factors[stage], before[stage - 1], grad, dfactors[stage], dbefore, stage)
        grad = dbefore
    return dfactors


def _multiply_supports(x: Tensor, factors: Tensor) -> str | None:
    if reason := unsupported(x):
        return reason
    if (size := factors.shape[-1]) > MAX_SIZE:
        return f"the Triton kernels rotate blocks of up to {MAX_SIZE}; got {size}"
    return next((r for first, last in passes(size, len(factors)) if (r := _supports(factors, last - first))), None)


def butterfly_multiply_supports(x: Tensor, factors: Tensor) -> str | None:
    """Return None, or why Triton cannot multiply x."""
    return _multiply_supports(x, factors)


def butterfly_multiply(x: Tensor, factors: Tensor) -> Tensor:
    """See `peftk.functional.butterfly_multiply`."""
    return multiply(x, factors, butterfly_compose, block_rotate)[0]


def butterfly_multiply_backward_supports(grad: Tensor, x: Tensor, factors: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return _multiply_supports(grad, factors)


def butterfly_multiply_backward(
    grad: Tensor, x: Tensor, factors: Tensor, need_x: bool, need_factors: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `butterfly_multiply` in x and in the factors; an empty tensor for one not needed."""
    return multiply_backward(
        *(grad, x, factors, need_x, need_factors),
        *(butterfly_compose, butterfly_compose_backward, block_rotate, block_rotate_backward),
    )


def _layout(x: Tensor, channels: int, inner: int) -> dict[str, int]:
    """Return the arguments that say where the channels of x lie, and tiles that run along its memory."""
    cols = min(_power(channels, 16), 128) if inner == 1 else 16
    return {
        "rows": x.numel() // max(channels, 1),
        "channels": channels,
        "stride_outer": channels * inner,
        "inner": inner,
        "INNER_ONE": inner == 1,
        "BLOCK_ROWS": 128 if inner > 1 else 32 if cols <= 64 else 16,
        "BLOCK_COLS": cols,
        "num_warps": 4,
    }


def scale_channels_supports(x: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot scale x."""
    return unsupported(x)


def scale_channels(x: Tensor, scale: Tensor, bias: Tensor | None, inner: int) -> Tensor:
    """See `peftk.functional.scale_channels`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    layout = _layout(x, scale.numel(), inner)
    scale = scale.contiguous()
    tiles = triton.cdiv(layout["rows"], layout["BLOCK_ROWS"]) * triton.cdiv(scale.numel(), layout["BLOCK_COLS"])
    launch(
        _scale_channels_kernel,
        (tiles,),
        x_ptr=x,
        scale_ptr=scale,
        bias_ptr=scale if bias is None else bias.contiguous(),
        y_ptr=y,
        HAS_BIAS=bias is not None,
        **layout,
    )
    return y


def scale_channels_backward_supports(grad: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return unsupported(grad)


def scale_channels_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    inner: int,
    need_x: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, in the scale and in the bias; an empty tensor for one not needed."""
    grad, x, scale = grad.contiguous(), x.contiguous(), scale.contiguous()
    dx = torch.empty(grad.shape if need_x else 0, dtype=grad.dtype, device=grad.device)
    channels, sums = scale.numel(), need_scale or need_bias
    # Few rows are a chunk of their own, no longer than they are.
    rows = grad.numel() // max(channels, 1)
    layout = _layout(grad, channels, inner)
    chunk = min(ROWS_OF_A_CHUNK, _power(rows, layout["BLOCK_ROWS"]))
    chunks = triton.cdiv(rows, chunk)
    partial = torch.empty((chunks, 2, channels) if sums else 0, dtype=torch.float32, device=grad.device)
    if grad.numel() and (need_x or sums):
        launch(
            _scale_channels_backward_kernel,
            (chunks * triton.cdiv(channels, layout["BLOCK_COLS"]),),
            grad_ptr=grad,
            x_ptr=x,
            scale_ptr=scale,
            bias_ptr=scale if bias is None else bias.contiguous(),
            dx_ptr=dx,
            partial_ptr=partial,
            HAS_BIAS=bias is not None,
            NEED_X=need_x,
            NEED_SUMS=sums,
            CHUNK=chunk,
            **layout,
        )
    dscale, dbias = scale.new_empty(0), (grad if bias is None else bias).new_empty(0)
    if sums:
        product, total = partial[0] if chunks == 1 else partial.sum(0)
        if need_scale:
            dscale = product.to(scale.dtype)
        if bias is not None and need_bias:
            dbias = ((1 - scale.float()) * total).to(bias.dtype)
    return dx, dscale, dbias
