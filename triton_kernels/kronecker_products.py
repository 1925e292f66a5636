"""The kernels of the Kronecker product of activations, and how they are launched."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

LARGEST = 128
"""Largest size of w1: a token's rows must fit in a tile."""

LARGEST_FLOAT = 32
"""The same in float32, whose tiles stay below 64 rows."""

FAR = tl.constexpr(2.0**30)
"""Divided by it, what overflows float16 fits: from 2^16 to 2^46, more than 16,384 products of float16 add up to."""


@triton.jit
def _magnitudes(values):
    """Return the bits of float32 numbers without their signs: integers in the order of the absolute values."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _overflows(magnitudes, dtype: tl.constexpr):
    """Say which numbers, given by their `_magnitudes`, round to infinity in dtype or are not finite."""
    if dtype == tl.float16:
        return magnitudes >= 0x477FF000
    elif dtype == tl.bfloat16:
        return magnitudes >= 0x7F7F8000
    else:
        return magnitudes >= 0x7F800000


@triton.jit
def _lost(magnitudes, dtype: tl.constexpr):
    """Say which numbers no multiple of dtype holds: in float16, `_split` saves those below 2^46."""
    return magnitudes >= 0x56800000 if dtype == tl.float16 else _overflows(magnitudes, dtype)


@triton.jit
def _split(values):
    """Return what overflows float16, divided by `FAR`, in float16, and everything else in float32."""
    far = _overflows(_magnitudes(values), tl.float16)
    return tl.where(far, values * (1 / FAR), 0.0).to(tl.float16), tl.where(far, 0.0, values)


@triton.jit
def _small_factor(
    w1_ptr,
    stride_out,
    stride_in,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    ROWS_IN: tl.constexpr,
    PACK: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return w1 as the block-diagonal matrix of a tile, (ROWS_OUT, ROWS_IN): a block for each of PACK tokens."""
    outs, ins = tl.arange(0, ROWS_OUT), tl.arange(0, ROWS_IN)  # [ROWS_OUT], [ROWS_IN]
    # [ROWS_OUT, ROWS_IN]
    inside = (outs[:, None] // OUT == ins[None, :] // IN) & (outs[:, None] < PACK * OUT) & (ins[None, :] < PACK * IN)
    values = tl.load(
        w1_ptr + (outs % OUT)[:, None] * stride_out + (ins % IN)[None, :] * stride_in, mask=inside, other=0.0
    )  # [ROWS_OUT, ROWS_IN]
    return values.to(dtype)


@triton.jit
def _places(token, columns_at, tokens, columns, OUT: tl.constexpr, PACK: tl.constexpr, ROWS_OUT: tl.constexpr):
    """Return where the output of the tokens of a tile lies, and what of it exists."""
    outs = tl.arange(0, ROWS_OUT)  # [ROWS_OUT]
    rows = token * OUT + outs  # [ROWS_OUT]
    # [ROWS_OUT, BLOCK_COLUMNS]
    mask = ((outs < PACK * OUT) & (rows < tokens * OUT))[:, None] & (columns_at < columns)[None, :]
    return rows[:, None] * columns + columns_at[None, :], mask


@triton.jit
def _times_w2(
    in_ptr,
    w2_ptr,
    token,
    columns_at,
    tokens,
    depth,
    columns,
    stride_w2_depth,
    stride_w2_column,
    IN: tl.constexpr,
    PACK: tl.constexpr,
    ROWS_IN: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Return in[t] @ w2 in float32 for the tokens of a tile."""
    ins, depths = tl.arange(0, ROWS_IN), tl.arange(0, BLOCK_DEPTH)  # [ROWS_IN], [BLOCK_DEPTH]
    rows = token * IN + ins  # [ROWS_IN]
    row_mask = ((ins < PACK * IN) & (rows < tokens * IN))[:, None]  # [ROWS_IN, 1]
    in_columns = (columns_at < columns)[None, :]  # [1, BLOCK_COLUMNS]
    product = tl.zeros((ROWS_IN, columns_at.shape[0]), dtype=tl.float32)  # [ROWS_IN, BLOCK_COLUMNS]
    for k in range(0, depth, BLOCK_DEPTH):
        in_depth = k + depths < depth  # [BLOCK_DEPTH]
        left = tl.load(
            in_ptr + rows[:, None] * depth + (k + depths)[None, :], mask=row_mask & in_depth[None, :], other=0.0
        )  # [ROWS_IN, BLOCK_DEPTH]
        right = tl.load(
            w2_ptr + (k + depths).to(tl.int64)[:, None] * stride_w2_depth + columns_at[None, :] * stride_w2_column,
            mask=in_depth[:, None] & in_columns,
            other=0.0,
        )  # [BLOCK_DEPTH, BLOCK_COLUMNS]
        product = tl.dot(left, right, product, input_precision="ieee")
    return product


@triton.jit
def _without_lost(
    product, magnitudes, dtype: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ROWS_OUT: tl.constexpr
):
    """Return the product with zeros for rows that are not finite, and marks for these and for all rows of their tokens.

    A zero of the mixer times infinity would reach every token of the tile.
    """
    ins, outs = tl.arange(0, product.shape[0]), tl.arange(0, ROWS_OUT)  # [ROWS_IN], [ROWS_OUT]
    lost = _lost(tl.max(magnitudes, 1), dtype)  # [ROWS_IN]
    pairs = lost[None, :] & (outs[:, None] // OUT == ins[None, :] // IN)  # [ROWS_OUT, ROWS_IN]
    return tl.where(lost[:, None], 0.0, product), lost.to(tl.int32), tl.max(pairs.to(tl.int32), 1)


@triton.jit
def _store_on_base(out_ptr, base_ptr, y, offsets, mask):
    """Store base + y, or y alone where there is no base."""
    if base_ptr is not None:
        base = tl.load(base_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS_OUT, BLOCK_COLUMNS]
        # -0.0 + 0.0 is +0.0: where the product is zero, every bit of the base stays.
        y = tl.where(y == 0.0, base, base + y)  # [ROWS_OUT, BLOCK_COLUMNS]
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(partial_ptr, sums, OUT: tl.constexpr, IN: tl.constexpr, PACK: tl.constexpr):
    """Store the blocks of a tile's tokens, each (IN, OUT), of sums over pairs of rows, (ROWS_IN, ROWS_OUT)."""
    # [ROWS_IN, 1], [1, ROWS_OUT]
    ins, outs = tl.arange(0, sums.shape[0])[:, None], tl.arange(0, sums.shape[1])[None, :]
    same = (ins // IN == outs // OUT) & (ins < PACK * IN) & (outs < PACK * OUT)  # [ROWS_IN, ROWS_OUT]
    tl.store(partial_ptr + ins // IN * (IN * OUT) + ins % IN * OUT + outs % OUT, sums, mask=same)


@triton.jit
def _kronecker_product_kernel(
    out_ptr,
    base_ptr,
    in_ptr,
    w1_ptr,
    w2_ptr,
    other_ptr,
    partial_ptr,
    tokens,
    depth,
    columns,
    scale,
    column_tiles,
    tiles_per_chunk,
    stride_w1_out,
    stride_w1_in,
    stride_w2_depth,
    stride_w2_column,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    PACK: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    ROWS_IN: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute out[t] = base[t] + scale * w1 @ (in[t] @ w2), and sums over tokens of (in[t] @ w2) @ other[t].T.

    in is (tokens, IN, depth), out, base and other are (tokens, OUT, columns); out may be base itself, and each may be
    None. A token whose in[t] @ w2 is not finite gets NaN, whatever shares its tile; what overflows float16 alone is
    not lost.
    """
    dtype: tl.constexpr = in_ptr.dtype.element_ty
    SHARED: tl.constexpr = PACK > 1 and out_ptr is not None
    HALF: tl.constexpr = dtype == tl.float16
    program = tl.program_id(0).to(tl.int64)
    columns_at = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    first_tile = program // column_tiles * tiles_per_chunk
    if out_ptr is not None:
        # [ROWS_OUT, ROWS_IN]
        mixer = _small_factor(w1_ptr, stride_w1_out, stride_w1_in, OUT, IN, ROWS_OUT, ROWS_IN, PACK, dtype)
    if other_ptr is not None:
        sums = tl.zeros((ROWS_IN, ROWS_OUT), dtype=tl.float32)  # [ROWS_IN, ROWS_OUT]
    ruined = tl.zeros((ROWS_IN,), tl.int32)  # [ROWS_IN]
    for t in range(tiles_per_chunk):
        token = (first_tile + t) * PACK
        product = _times_w2(
            in_ptr,
            w2_ptr,
            token,
            columns_at,
            tokens,
            depth,
            columns,
            stride_w2_depth,
            stride_w2_column,
            IN,
            PACK,
            ROWS_IN,
            BLOCK_DEPTH,
        )  # [ROWS_IN, BLOCK_COLUMNS]
        spoilt = tl.zeros((ROWS_OUT,), tl.int32)  # [ROWS_OUT]
        y = tl.zeros((ROWS_OUT, BLOCK_COLUMNS), dtype=tl.float32)  # [ROWS_OUT, BLOCK_COLUMNS]
        if SHARED or HALF:
            magnitudes = _magnitudes(product)  # [ROWS_IN, BLOCK_COLUMNS]
            if _overflows(tl.max(magnitudes), dtype):
                if SHARED:
                    # [ROWS_IN, BLOCK_COLUMNS], [ROWS_IN], [ROWS_OUT]
                    product, lost, spoilt = _without_lost(product, magnitudes, dtype, OUT, IN, ROWS_OUT)
                    ruined |= lost
                if HALF:
                    far, product = _split(product)  # [ROWS_IN, BLOCK_COLUMNS] each
                    if out_ptr is not None:
                        y = tl.dot(mixer, far, input_precision="ieee") * FAR
                    if other_ptr is not None:
                        # [ROWS_OUT, BLOCK_COLUMNS] each
                        offsets, mask = _places(token, columns_at, tokens, columns, OUT, PACK, ROWS_OUT)
                        other = tl.load(other_ptr + offsets, mask=mask, other=0.0)  # [ROWS_OUT, BLOCK_COLUMNS]
                        sums += tl.dot(far, tl.trans(other), input_precision="ieee") * FAR
        offsets, mask = _places(token, columns_at, tokens, columns, OUT, PACK, ROWS_OUT)
        product = product.to(dtype)
        if other_ptr is not None:
            other = tl.load(other_ptr + offsets, mask=mask, other=0.0)
            sums = tl.dot(product, tl.trans(other), sums, input_precision="ieee")
        if out_ptr is not None:
            y = tl.dot(mixer, product, y, input_precision="ieee") * scale
            if SHARED:
                y = tl.where((spoilt > 0)[:, None], float("nan"), y)
            _store_on_base(out_ptr, base_ptr, y, offsets, mask)
    if other_ptr is not None:
        if SHARED:
            sums = tl.where((ruined > 0)[:, None], float("nan"), sums)
        _store_sums(partial_ptr + program * PACK * IN * OUT, sums, OUT, IN, PACK)


@triton.jit
def _kronecker_factor_kernel(
    partial_ptr,
    grad_ptr,
    x_ptr,
    w1_ptr,
    tokens,
    rows,
    columns,
    row_tiles,
    column_tiles,
    tiles_per_chunk,
    LEFT: tl.constexpr,
    MIDDLE: tl.constexpr,
    PACK: tl.constexpr,
    ROWS_LEFT: tl.constexpr,
    ROWS_MIDDLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute a chunk's part of dw2 (rows, columns) = sum of grad[t].T @ (w1 @ x[t]).

    grad is (tokens, LEFT, rows), x is (tokens, MIDDLE, columns) and w1 (LEFT, MIDDLE).
    """
    dtype = grad_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    columns_at = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    rows_at = program // column_tiles % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    chunk = program // column_tiles // row_tiles
    lefts, middles = tl.arange(0, ROWS_LEFT), tl.arange(0, ROWS_MIDDLE)  # [ROWS_LEFT], [ROWS_MIDDLE]
    # [ROWS_LEFT, ROWS_MIDDLE]
    mixer = _small_factor(w1_ptr, MIDDLE, 1, LEFT, MIDDLE, ROWS_LEFT, ROWS_MIDDLE, PACK, dtype)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    for t in range(tiles_per_chunk):
        token = (chunk * tiles_per_chunk + t) * PACK
        grad_rows, x_rows = token * LEFT + lefts, token * MIDDLE + middles  # [ROWS_LEFT], [ROWS_MIDDLE]
        grad = tl.load(
            grad_ptr + grad_rows[:, None] * rows + rows_at[None, :],
            mask=((lefts < PACK * LEFT) & (grad_rows < tokens * LEFT))[:, None] & (rows_at < rows)[None, :],
            other=0.0,
        )  # [ROWS_LEFT, BLOCK_ROWS]
        x = tl.load(
            x_ptr + x_rows[:, None] * columns + columns_at[None, :],
            mask=((middles < PACK * MIDDLE) & (x_rows < tokens * MIDDLE))[:, None] & (columns_at < columns)[None, :],
            other=0.0,
        )  # [ROWS_MIDDLE, BLOCK_COLUMNS]
        mixed = tl.dot(mixer, x, input_precision="ieee")  # [ROWS_LEFT, BLOCK_COLUMNS]
        if dtype == tl.float16:
            overflows = _overflows(tl.max(_magnitudes(mixed)), dtype)
            if overflows:
                far, mixed = _split(mixed)  # [ROWS_LEFT, BLOCK_COLUMNS] each
                sums += tl.dot(tl.trans(grad), far, input_precision="ieee") * FAR
        sums = tl.dot(tl.trans(grad), mixed.to(dtype), sums, input_precision="ieee")
    tl.store(
        partial_ptr + chunk * rows * columns + rows_at[:, None] * columns + columns_at[None, :],
        sums,
        mask=(rows_at < rows)[:, None] & (columns_at < columns)[None, :],
    )


def power(value: int, least: int, most: int) -> int:
    """Return the next power of two within bounds."""
    return min(most, max(least, triton.next_power_of_2(value)))


def _pack(tokens: int, left: int, middle: int, half: bool) -> int:
    """Return how many tokens share a tile."""
    largest = max(left, middle)
    return min(max(1, (64 if half else 32) // largest), max(1, triton.next_power_of_2(tokens)))


def _product_config(pack: int, outs: int, ins: int, depth: int, width: int, half: bool, sums: bool) -> dict[str, int]:
    """Return the tile of a product: what fits in registers on every target that is compiled for, untimed.

    Rows that no wide access fits take registers for addresses: small tiles, or they spill.
    """
    rows_out, rows_in = power(pack * outs, 16, LARGEST), power(pack * ins, 16, LARGEST)
    large, odd = max(rows_in, rows_out) > 64, depth % 16 != 0 or width % 16 != 0
    block = power(width, 16, (64 if large or odd or sums else 128) if half else 32)
    return {
        "OUT": outs,
        "IN": ins,
        "PACK": pack,
        "ROWS_OUT": rows_out,
        "ROWS_IN": rows_in,
        "BLOCK_DEPTH": power(depth, 16, 32),
        "BLOCK_COLUMNS": min(block, 32) if (odd if sums else large) else block,
        "num_warps": 8 if half else 4,
        "num_stages": 2,
    }


def _factor_config(pack: int, left: int, middle: int, rows: int, columns: int, half: bool) -> dict[str, int]:
    """Return the tile of the gradient in w2, as `_product_config` that of a product."""
    rows_left, rows_middle = power(pack * left, 16, LARGEST), power(pack * middle, 16, LARGEST)
    small = max(rows_left, rows_middle) != 64 or rows % 16 != 0 or columns % 16 != 0
    return {
        "LEFT": left,
        "MIDDLE": middle,
        "PACK": pack,
        "ROWS_LEFT": rows_left,
        "ROWS_MIDDLE": rows_middle,
        "BLOCK_ROWS": power(rows, 16, (64 if small else 128) if half else 32),
        "BLOCK_COLUMNS": power(columns, 16, 64 if half else 32),
        "num_warps": 8 if half else 4,
    }


def _chunks(tiles: int, others: int, programs: int) -> tuple[int, int]:
    """Cut tiles of tokens into chunks, for about so many programs in all; return their number and size."""
    wanted = max(1, min(tiles, programs // max(others, 1)))
    per_chunk = max(1, triton.cdiv(tiles, wanted))
    return triton.cdiv(tiles, per_chunk), per_chunk


def product(
    out: Tensor | None,
    base: Tensor | None,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    scale: float,
    *,
    transposed: bool = False,
    other: Tensor | None = None,
) -> Tensor | None:
    """Write ``base + scale * w1 (x w2.T)``, or with both factors transposed; return dw1 if ``other`` is given.

    x, out, base and other are contiguous, and so is w1.
    """
    left, middle = w1.shape
    rows, columns = w2.shape
    strides_w2 = w2.stride()
    if transposed:
        outs, ins, depth, width, strides_w1 = middle, left, rows, columns, (1, middle)
    else:
        outs, ins, depth, width, strides_w1 = left, middle, columns, rows, (middle, 1)
        strides_w2 = strides_w2[::-1]
    tokens = x.numel() // (ins * depth)
    half = x.dtype is not torch.float32
    pack = _pack(tokens, left, middle, half)
    config = _product_config(pack, outs, ins, depth, width, half, other is not None)
    tiles, column_tiles = triton.cdiv(tokens, pack), triton.cdiv(width, config["BLOCK_COLUMNS"])
    chunks, per_chunk = (tiles, 1) if other is None else _chunks(tiles, column_tiles, 512)
    partial = None
    if other is not None:
        partial = torch.empty(chunks * column_tiles * pack, ins, outs, dtype=torch.float32, device=x.device)
    launch(
        _kronecker_product_kernel,
        (chunks * column_tiles,),
        out_ptr=out,
        base_ptr=base,
        in_ptr=x,
        w1_ptr=w1,
        w2_ptr=w2,
        other_ptr=other,
        partial_ptr=partial,
        tokens=tokens,
        depth=depth,
        columns=width,
        scale=scale,
        column_tiles=column_tiles,
        tiles_per_chunk=per_chunk,
        stride_w1_out=strides_w1[0],
        stride_w1_in=strides_w1[1],
        stride_w2_depth=strides_w2[0],
        stride_w2_column=strides_w2[1],
        **config,
    )
    return None if partial is None else partial.sum(0) * scale


def large_factor_gradient(grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """Return dw2; everything is contiguous."""
    left, middle = w1.shape
    rows, columns = w2.shape
    tokens = x.numel() // (middle * columns)
    half = x.dtype is not torch.float32
    pack = _pack(tokens, left, middle, half)
    config = _factor_config(pack, left, middle, rows, columns, half)
    row_tiles, column_tiles = triton.cdiv(rows, config["BLOCK_ROWS"]), triton.cdiv(columns, config["BLOCK_COLUMNS"])
    chunks, per_chunk = _chunks(triton.cdiv(tokens, pack), row_tiles * column_tiles, 512)
    partial = torch.empty(chunks, rows, columns, dtype=torch.float32, device=x.device)
    launch(
        _kronecker_factor_kernel,
        (chunks * row_tiles * column_tiles,),
        partial_ptr=partial,
        grad_ptr=grad,
        x_ptr=x,
        w1_ptr=w1,
        tokens=tokens,
        rows=rows,
        columns=columns,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        tiles_per_chunk=per_chunk,
        **config,
    )
    return partial.sum(0) * scale
