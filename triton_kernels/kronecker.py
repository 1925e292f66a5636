"""The Kronecker product in Triton: the small factor is applied inside the product with the large one.

The rows of some tokens, m or l for each, make one tile. The small factor acts on such a tile as a block-diagonal
matrix with a copy of itself for every token, which is a matrix instruction more between the product with w2 and the
store; nothing between the two contractions goes to memory. The order is always w2 first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from ._launch import launch, unsupported

LARGEST = 128
"""Largest size of w1: a token's rows must fit in a tile."""

LARGEST_FLOAT = 32
"""The same in float32, whose tiles stay below 64 rows."""


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
    outs, ins = tl.arange(0, ROWS_OUT), tl.arange(0, ROWS_IN)
    inside = (outs[:, None] // OUT == ins[None, :] // IN) & (outs[:, None] < PACK * OUT) & (ins[None, :] < PACK * IN)
    values = tl.load(
        w1_ptr + (outs % OUT)[:, None] * stride_out + (ins % IN)[None, :] * stride_in, mask=inside, other=0.0
    )
    return values.to(dtype)


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
    HAS_BASE: tl.constexpr,
    NEED_OUT: tl.constexpr,
    NEED_W1: tl.constexpr,
):
    """Compute out[t] = base[t] + scale * w1 @ (in[t] @ w2), and sums over tokens of (in[t] @ w2) @ other[t].T.

    in is (tokens, IN, depth), out, base and other are (tokens, OUT, columns); out may be base itself.
    """
    dtype = in_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    start = program % column_tiles * BLOCK_COLUMNS
    first_tile = program // column_tiles * tiles_per_chunk
    columns_at = start + tl.arange(0, BLOCK_COLUMNS)
    depths = tl.arange(0, BLOCK_DEPTH)
    ins, outs = tl.arange(0, ROWS_IN), tl.arange(0, ROWS_OUT)
    in_columns = (columns_at < columns)[None, :]
    if NEED_OUT:
        mixer = _small_factor(w1_ptr, stride_w1_out, stride_w1_in, OUT, IN, ROWS_OUT, ROWS_IN, PACK, dtype)
    if NEED_W1:
        sums = tl.zeros((ROWS_IN, ROWS_OUT), dtype=tl.float32)
    for t in range(tiles_per_chunk):
        token = (first_tile + t) * PACK
        rows = token * IN + ins
        row_mask = ((ins < PACK * IN) & (rows < tokens * IN))[:, None]
        product = tl.zeros((ROWS_IN, BLOCK_COLUMNS), dtype=tl.float32)
        for k in range(0, depth, BLOCK_DEPTH):
            in_depth = k + depths < depth
            left = tl.load(
                in_ptr + rows[:, None] * depth + (k + depths)[None, :], mask=row_mask & in_depth[None, :], other=0.0
            )
            right = tl.load(
                w2_ptr + (k + depths).to(tl.int64)[:, None] * stride_w2_depth + columns_at[None, :] * stride_w2_column,
                mask=in_depth[:, None] & in_columns,
                other=0.0,
            )
            product = tl.dot(left, right, product, input_precision="ieee")
        product = product.to(dtype)
        out_rows = token * OUT + outs
        mask = ((outs < PACK * OUT) & (out_rows < tokens * OUT))[:, None] & in_columns
        offsets = out_rows[:, None] * columns + columns_at[None, :]
        if NEED_W1:
            other = tl.load(other_ptr + offsets, mask=mask, other=0.0)
            sums = tl.dot(product, tl.trans(other), sums, input_precision="ieee")
        if NEED_OUT:
            y = tl.dot(mixer, product, input_precision="ieee") * scale
            if HAS_BASE:
                base = tl.load(base_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                # -0.0 + 0.0 is +0.0: where the product is zero, every bit of the base stays.
                y = tl.where(y == 0.0, base, base + y)
            tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
    if NEED_W1:
        same = (ins[:, None] // IN == outs[None, :] // OUT) & (ins[:, None] < PACK * IN) & (outs[None, :] < PACK * OUT)
        block = partial_ptr + (program * PACK + ins[:, None] // IN) * (IN * OUT)
        tl.store(block + (ins % IN)[:, None] * OUT + (outs % OUT)[None, :], sums, mask=same)


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
    columns_at = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    rows_at = program // column_tiles % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    chunk = program // column_tiles // row_tiles
    lefts, middles = tl.arange(0, ROWS_LEFT), tl.arange(0, ROWS_MIDDLE)
    mixer = _small_factor(w1_ptr, MIDDLE, 1, LEFT, MIDDLE, ROWS_LEFT, ROWS_MIDDLE, PACK, dtype)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for t in range(tiles_per_chunk):
        token = (chunk * tiles_per_chunk + t) * PACK
        grad_rows, x_rows = token * LEFT + lefts, token * MIDDLE + middles
        grad = tl.load(
            grad_ptr + grad_rows[:, None] * rows + rows_at[None, :],
            mask=((lefts < PACK * LEFT) & (grad_rows < tokens * LEFT))[:, None] & (rows_at < rows)[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + x_rows[:, None] * columns + columns_at[None, :],
            mask=((middles < PACK * MIDDLE) & (x_rows < tokens * MIDDLE))[:, None] & (columns_at < columns)[None, :],
            other=0.0,
        )
        mixed = tl.dot(mixer, x, input_precision="ieee").to(dtype)
        sums = tl.dot(tl.trans(grad), mixed, sums, input_precision="ieee")
    tl.store(
        partial_ptr + chunk * rows * columns + rows_at[:, None] * columns + columns_at[None, :],
        sums,
        mask=(rows_at < rows)[:, None] & (columns_at < columns)[None, :],
    )


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
    columns_at = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    rows_at = program // column_tiles % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    block = program // column_tiles // row_tiles
    mask = (rows_at < rows)[:, None] & (columns_at < columns)[None, :]
    factor = tl.load(w1_ptr + block)
    w2 = tl.load(w2_ptr + rows_at[:, None] * columns + columns_at[None, :], mask=mask, other=0.0)
    offsets = ((block // middle * rows + rows_at)[:, None] * middle + block % middle) * columns + columns_at[None, :]
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(w2.dtype)
    delta = factor * scale * w2
    result = tl.where(delta == 0.0, weight, weight + delta)
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
    columns_at = tile % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    rows_at = tile // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (rows_at < rows)[:, None] & (columns_at < columns)[None, :]
    small = rows_at[:, None] * columns + columns_at[None, :]
    w2 = tl.load(w2_ptr + small, mask=mask, other=0.0)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    first = chunk * left_per_chunk * middle
    last = tl.minimum(first + left_per_chunk * middle, left * middle)
    for block in range(first, last):
        offsets = ((block // middle * rows + rows_at)[:, None] * middle + block % middle) * columns
        grad = tl.load(grad_ptr + offsets + columns_at[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEED_W1:
            tl.store(dw1_ptr + tile * left * middle + block, tl.sum(grad * w2))
        if NEED_W2:
            sums += grad * tl.load(w1_ptr + block)
    if NEED_W2:
        tl.store(dw2_ptr + chunk * rows * columns + small, sums, mask=mask)


def _power(value: int, least: int, most: int) -> int:
    return min(most, max(least, triton.next_power_of_2(value)))


def _pack(tokens: int, left: int, middle: int, half: bool) -> int:
    """Return how many tokens share a tile."""
    largest = max(left, middle)
    return min(max(1, (64 if half else 32) // largest), max(1, triton.next_power_of_2(tokens)))


def _chunks(tiles: int, others: int, programs: int) -> tuple[int, int]:
    """Cut tiles of tokens into chunks, for about so many programs in all; return their number and size."""
    wanted = max(1, min(tiles, programs // max(others, 1)))
    per_chunk = max(1, triton.cdiv(tiles, wanted))
    return triton.cdiv(tiles, per_chunk), per_chunk


def _factor_reason(x: Tensor, w1: Tensor, w2: Tensor) -> str | None:
    if reason := unsupported(x):
        return reason
    largest = LARGEST_FLOAT if x.dtype is torch.float32 else LARGEST
    if max(w1.shape) > largest:
        return f"the Triton kernels take a w1 of up to {largest} x {largest} in {x.dtype}; got {tuple(w1.shape)}"
    if w1.dtype is not torch.float32 or w2.dtype is not x.dtype:
        return f"the Triton kernels take w1 in float32 and w2 in the dtype of x; got {w1.dtype} and {w2.dtype}"
    return None


def _product(
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
    rows_in, rows_out = _power(pack * ins, 16, LARGEST), _power(pack * outs, 16, LARGEST)
    large = max(rows_in, rows_out) > 64
    # Rows that no wide access fits take registers for addresses: small tiles, or they spill.
    small = large or other is not None or depth % 16 != 0 or width % 16 != 0
    block = _power(width, 16, (64 if small else 128) if half else 32)
    if large and other is None:
        block = min(block, 32)
    tiles, column_tiles = triton.cdiv(tokens, pack), triton.cdiv(width, block)
    chunks, per_chunk = (tiles, 1) if other is None else _chunks(tiles, column_tiles, 512)
    partial = x.new_empty((0,), dtype=torch.float32)
    if other is not None:
        partial = torch.empty(chunks * column_tiles * pack, ins, outs, dtype=torch.float32, device=x.device)
    launch(
        _kronecker_product_kernel,
        (chunks * column_tiles,),
        num_warps=8 if half else 4,
        num_stages=2,
        out_ptr=x if out is None else out,
        base_ptr=x if base is None else base,
        in_ptr=x,
        w1_ptr=w1,
        w2_ptr=w2,
        other_ptr=x if other is None else other,
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
        OUT=outs,
        IN=ins,
        PACK=pack,
        ROWS_OUT=rows_out,
        ROWS_IN=rows_in,
        BLOCK_DEPTH=_power(depth, 16, 32),
        BLOCK_COLUMNS=block,
        HAS_BASE=base is not None,
        NEED_OUT=out is not None,
        NEED_W1=other is not None,
    )
    return None if other is None else partial.sum(0) * scale


def _large_factor_gradient(grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    left, middle = w1.shape
    rows, columns = w2.shape
    tokens = x.numel() // (middle * columns)
    half = x.dtype is not torch.float32
    pack = _pack(tokens, left, middle, half)
    rows_left, rows_middle = _power(pack * left, 16, LARGEST), _power(pack * middle, 16, LARGEST)
    small = max(rows_left, rows_middle) != 64 or rows % 16 != 0 or columns % 16 != 0
    block_rows, block_columns = _power(rows, 16, (64 if small else 128) if half else 32), _power(columns, 16, 64)
    block_columns = block_columns if half else min(block_columns, 32)
    row_tiles, column_tiles = triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns)
    chunks, per_chunk = _chunks(triton.cdiv(tokens, pack), row_tiles * column_tiles, 512)
    partial = torch.empty(chunks, rows, columns, dtype=torch.float32, device=x.device)
    launch(
        _kronecker_factor_kernel,
        (chunks * row_tiles * column_tiles,),
        num_warps=8 if half else 4,
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
        LEFT=left,
        MIDDLE=middle,
        PACK=pack,
        ROWS_LEFT=rows_left,
        ROWS_MIDDLE=rows_middle,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
    )
    return (partial.sum(0) * scale).to(w2.dtype)


def kronecker_add_supports(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float) -> str | None:
    """Return None, or why Triton cannot run the call."""
    if base.dtype is not x.dtype:
        return f"the Triton kernels take base and x in one dtype; got {base.dtype} and {x.dtype}"
    return _factor_reason(x, w1, w2)


def kronecker_add(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.kronecker_add`."""
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    _product(out, base.contiguous(), x.contiguous(), w1.contiguous(), w2, scale)
    return out


def kronecker_linear_supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: float
) -> str | None:
    """Return None, or why Triton cannot run the call."""
    return _factor_reason(x, w1, w2)


def kronecker_linear(x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.kronecker_linear`."""
    # The base layer's own call comes first: where the product is zero, its bits stay.
    y = linear(x, weight, bias).contiguous()
    _product(y, y, x.contiguous(), w1.contiguous(), w2, scale)
    return y


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, w1: Tensor, w2: Tensor, scale: float, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_w1, need_w2 = needs
    dx, dw1, dw2 = grad.new_empty(0), w1.new_empty(0), w2.new_empty(0)
    grad, x, w1 = grad.contiguous(), x.contiguous(), w1.contiguous()
    if x.numel() == 0:
        return (
            torch.zeros_like(x) if need_x else dx,
            torch.zeros_like(w1) if need_w1 else dw1,
            torch.zeros(w2.shape, dtype=w2.dtype, device=w2.device) if need_w2 else dw2,
        )
    if need_x or need_w1:
        base = grad @ weight if need_x and weight is not None else None
        if need_x:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if base is None else base
        out = dx if need_x else None
        found = _product(out, base, grad, w1, w2, scale, transposed=True, other=x if need_w1 else None)
        # (l, m), as the product has the rows of the gradient.
        dw1 = found if need_w1 else dw1
    if need_w2:
        dw2 = _large_factor_gradient(grad, x, w1, w2, scale)
    return dx, dw1, dw2


def kronecker_add_backward_supports(grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return _factor_reason(x, w1, w2)


def kronecker_add_backward(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float, need_x: bool, need_w1: bool, need_w2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, w1 and w2; an empty tensor for one not needed."""
    return _gradients(grad, x, None, w1, w2, scale, (need_x, need_w1, need_w2))


def kronecker_linear_backward_supports(
    grad: Tensor, x: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, *args: object
) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return _factor_reason(x, w1, w2)


def kronecker_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    w1: Tensor,
    w2: Tensor,
    scale: float,
    need_x: bool,
    need_w1: bool,
    need_w2: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, w1, w2 and the bias; an empty tensor for one not needed."""
    dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else grad.new_empty(0)
    return *_gradients(grad, x, weight, w1, w2, scale, (need_x, need_w1, need_w2)), dbias


def kronecker_weight_supports(weight: Tensor, w1: Tensor, w2: Tensor, scale: float) -> str | None:
    """Return None, or why Triton cannot write the weight."""
    return unsupported(weight)


def _weight_tile(rows: int, columns: int) -> tuple[int, int]:
    block_columns = _power(columns, 1, 128)
    return _power(rows, 1, 2048 // block_columns), block_columns


def kronecker_weight(weight: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.kronecker_weight`."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    rows, columns = w2.shape
    block_rows, block_columns = _weight_tile(rows, columns)
    row_tiles, column_tiles = triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns)
    launch(
        _kronecker_weight_kernel,
        (w1.numel() * row_tiles * column_tiles,),
        num_warps=4,
        out_ptr=out,
        weight_ptr=weight.contiguous(),
        w1_ptr=w1.contiguous(),
        w2_ptr=w2.contiguous(),
        middle=w1.shape[1],
        rows=rows,
        columns=columns,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        scale=scale,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
    )
    return out


def kronecker_weight_backward_supports(grad: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return unsupported(grad)


def kronecker_weight_backward(
    grad: Tensor, w1: Tensor, w2: Tensor, scale: float, need_w1: bool, need_w2: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients in w1 and w2; an empty tensor for one not needed."""
    (left, middle), (rows, columns) = w1.shape, w2.shape
    block_rows, block_columns = _weight_tile(rows, columns)
    column_tiles = triton.cdiv(columns, block_columns)
    tiles = triton.cdiv(rows, block_rows) * column_tiles
    # As many parts of dw2 as keep them together far smaller than the weight.
    per_chunk = triton.cdiv(left, max(1, min(left, middle, 8)))
    chunks = triton.cdiv(left, per_chunk)
    new = {"dtype": torch.float32, "device": grad.device}
    dw1 = torch.empty((tiles, left, middle) if need_w1 else 0, **new)
    dw2 = torch.empty((chunks, rows, columns) if need_w2 else 0, **new)
    if need_w1 or need_w2:
        launch(
            _kronecker_weight_backward_kernel,
            (tiles * chunks,),
            num_warps=4,
            grad_ptr=grad.contiguous(),
            w1_ptr=w1.contiguous(),
            w2_ptr=w2.contiguous(),
            dw1_ptr=dw1,
            dw2_ptr=dw2,
            left=left,
            middle=middle,
            rows=rows,
            columns=columns,
            tiles=tiles,
            column_tiles=column_tiles,
            left_per_chunk=per_chunk,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            NEED_W1=need_w1,
            NEED_W2=need_w2,
        )
    return dw1.sum(0) * scale if need_w1 else dw1, dw2.sum(0) * scale if need_w2 else dw2
