"""Products of the four factors of LoHa in Triton.

The factors are small and stay in their own dtype; every product of them is computed in float32. The two halves of the
Khatri-Rao product, and the two gradients of the weight, are one kernel each, called with other strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, unsupported
from .low_rank_gradients import sum_chunks

MAX_RANK = 64
"""Largest rank: a factor's tile holds all of it, and wider ones do not fit in registers."""

PROGRAMS = 512
"""Programs that a gradient aims at: a few for each multiprocessor of a large GPU."""


@triton.jit
def _khatri_rao_kernel(
    out_ptr,
    left_ptr,
    right_ptr,
    features,
    rank,
    right_rank,
    stride_out_rank,
    stride_out_feature,
    stride_left_rank,
    stride_left_feature,
    stride_right_rank,
    stride_right_feature,
    BLOCK_RANK: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """Write out[i * right_rank + j, k] = left[i, k] * right[j, k] for one tile."""
    tiles = tl.cdiv(features, BLOCK_FEATURES)
    feature = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    pair = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)[:, None]
    mask = (pair < rank) & (feature < features)
    left = tl.load(
        left_ptr + pair // right_rank * stride_left_rank + feature * stride_left_feature, mask=mask, other=0.0
    )
    right = tl.load(
        right_ptr + pair % right_rank * stride_right_rank + feature * stride_right_feature, mask=mask, other=0.0
    )
    product = left.to(tl.float32) * right.to(tl.float32)
    tl.store(
        out_ptr + pair * stride_out_rank + feature * stride_out_feature,
        product.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _khatri_rao_backward_kernel(
    dleft_ptr,
    dright_ptr,
    grad_ptr,
    left_ptr,
    right_ptr,
    features,
    left_rank,
    right_rank,
    stride_grad_rank,
    stride_grad_feature,
    stride_left_rank,
    stride_left_feature,
    stride_right_rank,
    stride_right_feature,
    BLOCK_RANK: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    NEED_LEFT: tl.constexpr,
    NEED_RIGHT: tl.constexpr,
):
    """Write the gradients in left and right for one tile of features; the incoming one is read once."""
    feature = tl.program_id(0).to(tl.int64) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    j = tl.arange(0, BLOCK_RANK)[:, None]
    mask = (j < right_rank) & (feature < features)
    right_at = j * stride_right_rank + feature * stride_right_feature
    right = tl.load(right_ptr + right_at, mask=mask, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_RANK, BLOCK_FEATURES), tl.float32)
    # Not pipelined: Triton 3.7 was reported to miscompile a store inside a pipelined loop.
    for i in tl.range(0, left_rank, num_stages=1):
        grad = tl.load(
            grad_ptr + (i * right_rank + j).to(tl.int64) * stride_grad_rank + feature * stride_grad_feature,
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        left_at = i * stride_left_rank + feature * stride_left_feature
        if NEED_RIGHT:
            sums += grad * tl.load(left_ptr + left_at, mask=feature < features, other=0.0).to(tl.float32)
        if NEED_LEFT:
            dleft = tl.sum(grad * right, axis=0)[None, :]
            tl.store(dleft_ptr + left_at, dleft.to(dleft_ptr.dtype.element_ty), mask=feature < features)
    if NEED_RIGHT:
        tl.store(dright_ptr + right_at, sums.to(dright_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _factor(ptr, index, length, rank, stride_index, stride_rank, BLOCK_RANK: tl.constexpr, RANK_FIRST: tl.constexpr):
    """Load a tile of a factor in float32, (rank, index) or (index, rank)."""
    ranks = tl.arange(0, BLOCK_RANK)
    if RANK_FIRST:
        at = index[None, :] * stride_index + ranks[:, None] * stride_rank
        mask = (index[None, :] < length) & (ranks[:, None] < rank)
    else:
        at = index[:, None] * stride_index + ranks[None, :] * stride_rank
        mask = (index[:, None] < length) & (ranks[None, :] < rank)
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


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
    BLOCK_R1: tl.constexpr,
    BLOCK_R2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """Write out = weight + scale * (w1_a @ w1_b) * (w2_a @ w2_b) for one tile; everything is contiguous."""
    tiles = tl.cdiv(features, BLOCK_FEATURES)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    first = tl.dot(
        _factor(w1_a_ptr, row, rows, r1, r1, 1, BLOCK_R1, False),
        _factor(w1_b_ptr, column, features, r1, 1, features, BLOCK_R1, True),
        input_precision="ieee",
    )
    second = tl.dot(
        _factor(w2_a_ptr, row, rows, r2, r2, 1, BLOCK_R2, False),
        _factor(w2_b_ptr, column, features, r2, 1, features, BLOCK_R2, True),
        input_precision="ieee",
    )
    mask = (row[:, None] < rows) & (column[None, :] < features)
    at = row[:, None] * features + column[None, :]
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    delta = first * second * scale
    # -0.0 + 0.0 is +0.0: where nothing is added, every bit of the weight stays.
    result = tl.where(delta == 0.0, weight, weight + delta)
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hadamard_gradient_kernel(
    partials_ptr,
    grad_ptr,
    a1_ptr,
    b1_ptr,
    a2_ptr,
    b2_ptr,
    rows,
    columns,
    r1,
    r2,
    chunk_columns,
    scale,
    stride_grad_row,
    stride_grad_column,
    stride_a1_row,
    stride_a1_rank,
    stride_b1_column,
    stride_b1_rank,
    stride_a2_row,
    stride_a2_rank,
    stride_b2_column,
    stride_b2_rank,
    BLOCK_R1: tl.constexpr,
    BLOCK_R2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum the gradients in a1 and a2 over a chunk of columns, for one tile of rows.

    With rows and columns exchanged, a and b exchange their roles, and these are the gradients in b1 and b2. A chunk's
    sums lie one after the other, each in the layout of its factor.
    """
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    chunk = (tl.program_id(0) // tiles).to(tl.int64)
    a1 = _factor(a1_ptr, row, rows, r1, stride_a1_row, stride_a1_rank, BLOCK_R1, False)
    a2 = _factor(a2_ptr, row, rows, r2, stride_a2_row, stride_a2_rank, BLOCK_R2, False)
    sum1 = tl.zeros((BLOCK_ROWS, BLOCK_R1), tl.float32)
    sum2 = tl.zeros((BLOCK_ROWS, BLOCK_R2), tl.float32)
    for start in tl.range(0, chunk_columns, BLOCK_COLUMNS, num_stages=1):
        column = chunk * chunk_columns + start + tl.arange(0, BLOCK_COLUMNS)
        b1 = _factor(b1_ptr, column, columns, r1, stride_b1_column, stride_b1_rank, BLOCK_R1, True)
        b2 = _factor(b2_ptr, column, columns, r2, stride_b2_column, stride_b2_rank, BLOCK_R2, True)
        grad = tl.load(
            grad_ptr + row[:, None] * stride_grad_row + column[None, :] * stride_grad_column,
            mask=(row[:, None] < rows) & (column[None, :] < columns),
            other=0.0,
        )
        grad = grad.to(tl.float32) * scale
        first = tl.dot(a1, b1, input_precision="ieee")
        sum2 = tl.dot(grad * first, tl.trans(b2), sum2, input_precision="ieee")
        second = tl.dot(a2, b2, input_precision="ieee")
        sum1 = tl.dot(grad * second, tl.trans(b1), sum1, input_precision="ieee")
    rank1 = tl.arange(0, BLOCK_R1)[None, :]
    rank2 = tl.arange(0, BLOCK_R2)[None, :]
    inside = (row < rows)[:, None]
    out = partials_ptr + chunk * rows * (r1 + r2)
    tl.store(out + row[:, None] * stride_a1_row + rank1 * stride_a1_rank, sum1, mask=inside & (rank1 < r1))
    out += rows * r1
    tl.store(out + row[:, None] * stride_a2_row + rank2 * stride_a2_rank, sum2, mask=inside & (rank2 < r2))


def _reason(large: Tensor, left: Tensor, right: Tensor) -> str | None:
    """Judge by a tensor of full size and the two (out, rank) factors."""
    if left.dtype is torch.float64:
        return f"the Triton kernels take float32, float16 and bfloat16; got {left.dtype}"
    rank = max(left.shape[1], right.shape[1])
    if rank > MAX_RANK:
        return f"the Triton kernels take ranks of up to {MAX_RANK}; got {rank}"
    return unsupported(large)


def _contiguous(*factors: Tensor) -> tuple[Tensor, ...]:
    return tuple(f.contiguous() for f in factors)


def _block(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def khatri_rao_supports(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, dtype: torch.dtype | None
) -> str | None:
    """Return None, or why Triton cannot compute the factors."""
    if dtype is torch.float64:
        return f"the Triton kernels take float32, float16 and bfloat16; got {dtype}"
    return _reason(w1_a, w1_a, w2_a)


def khatri_rao(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the factors of rank r1 * r2; see `peftk.functional.khatri_rao`."""
    dtype = w1_a.dtype if dtype is None else dtype
    w1_a, w1_b, w2_a, w2_b = _contiguous(w1_a, w1_b, w2_a, w2_b)
    (out, r1), r2, features = w1_a.shape, w2_a.shape[1], w1_b.shape[1]
    rank = r1 * r2
    a = torch.empty(rank, features, dtype=dtype, device=w1_a.device)
    b = torch.empty(out, rank, dtype=dtype, device=w1_a.device)

    def write(result: Tensor, left: Tensor, right: Tensor, length: int, strides: dict[str, int], tile: tuple) -> None:
        launch(
            _khatri_rao_kernel,
            (triton.cdiv(length, tile[1]) * triton.cdiv(rank, tile[0]),),
            num_warps=4,
            out_ptr=result,
            left_ptr=left,
            right_ptr=right,
            features=length,
            rank=rank,
            right_rank=r2,
            BLOCK_RANK=tile[0],
            BLOCK_FEATURES=tile[1],
            **strides,
        )

    rank_first = {"stride_out_rank": features, "stride_left_rank": features, "stride_right_rank": features}
    write(a, w1_b, w2_b, features, _strides(rank_first, 1), (8, 256))
    rank_last = {"stride_out_feature": rank, "stride_left_feature": r1, "stride_right_feature": r2}
    write(b, w1_a, w2_a, out, _strides(rank_last, 1), (64, 32))
    return a, b


def _strides(known: dict[str, int], rest: int) -> dict[str, int]:
    """Complete the strides along rank or features by those along the other one."""
    other = {"rank": "feature", "feature": "rank"}
    found = dict(known)
    for name in known:
        head, _, tail = name.rpartition("_")
        found[f"{head}_{other[tail]}"] = rest
    return found


def khatri_rao_backward_supports(
    grad_a: Tensor, grad_b: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, *args: object
) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return _reason(grad_a, w1_a, w2_a) or unsupported(grad_b)


def khatri_rao_backward(
    grad_a: Tensor,
    grad_b: Tensor,
    w1_a: Tensor,
    w1_b: Tensor,
    w2_a: Tensor,
    w2_b: Tensor,
    need_w1_a: bool,
    need_w1_b: bool,
    need_w2_a: bool,
    need_w2_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in the four factors; an empty tensor for one not needed."""
    w1_a, w1_b, w2_a, w2_b = _contiguous(w1_a, w1_b, w2_a, w2_b)
    (out, r1), r2, features = w1_a.shape, w2_a.shape[1], w1_b.shape[1]
    block = _block(r2)

    def half(
        grad: Tensor, left: Tensor, right: Tensor, length: int, strides: dict[str, int], need_left: bool, need_right
    ) -> tuple[Tensor, Tensor]:
        dleft = torch.empty(left.shape if need_left else 0, dtype=left.dtype, device=left.device)
        dright = torch.empty(right.shape if need_right else 0, dtype=right.dtype, device=right.device)
        if need_left or need_right:
            launch(
                _khatri_rao_backward_kernel,
                (triton.cdiv(length, 2048 // block),),
                num_warps=4,
                dleft_ptr=dleft if need_left else left,
                dright_ptr=dright if need_right else right,
                grad_ptr=grad.contiguous(),
                left_ptr=left,
                right_ptr=right,
                features=length,
                left_rank=r1,
                right_rank=r2,
                BLOCK_RANK=block,
                BLOCK_FEATURES=2048 // block,
                NEED_LEFT=need_left,
                NEED_RIGHT=need_right,
                **strides,
            )
        return dleft, dright

    rank_first = {"stride_grad_rank": features, "stride_left_rank": features, "stride_right_rank": features}
    dw1_b, dw2_b = half(grad_a, w1_b, w2_b, features, _strides(rank_first, 1), need_w1_b, need_w2_b)
    rank_last = {"stride_grad_feature": r1 * r2, "stride_left_feature": r1, "stride_right_feature": r2}
    dw1_a, dw2_a = half(grad_b, w1_a, w2_a, out, _strides(rank_last, 1), need_w1_a, need_w2_a)
    return dw1_a, dw1_b, dw2_a, dw2_b


# float32 tiles stay below 64 rows: from there on Triton 3.7 may compute an "ieee" dot in tf32 on sm_100.
_ROWS = 32


def hadamard_weight_supports(weight: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot write the weight."""
    return _reason(weight, w1_a, w2_a)


def hadamard_weight(weight: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float) -> Tensor:
    """Return ``weight + scale * (w1_a @ w1_b) * (w2_a @ w2_b)``; see `peftk.functional.hadamard_weight`."""
    weight = weight.contiguous()
    w1_a, w1_b, w2_a, w2_b = _contiguous(w1_a, w1_b, w2_a, w2_b)
    (rows, r1), r2, features = w1_a.shape, w2_a.shape[1], w1_b.shape[1]
    out = torch.empty_like(weight)
    launch(
        _hadamard_weight_kernel,
        (triton.cdiv(rows, _ROWS) * triton.cdiv(features, 64),),
        num_warps=4,
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
        BLOCK_R1=_block(r1),
        BLOCK_R2=_block(r2),
        BLOCK_ROWS=_ROWS,
        BLOCK_FEATURES=64,
    )
    return out


def hadamard_weight_backward_supports(
    grad: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, *args: object
) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return _reason(grad, w1_a, w2_a)


def hadamard_weight_backward(
    grad: Tensor,
    w1_a: Tensor,
    w1_b: Tensor,
    w2_a: Tensor,
    w2_b: Tensor,
    scale: float,
    need_w1_a: bool,
    need_w1_b: bool,
    need_w2_a: bool,
    need_w2_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in the four factors; an empty tensor for one not needed."""
    w1_a, w1_b, w2_a, w2_b = _contiguous(w1_a, w1_b, w2_a, w2_b)
    grad = grad.contiguous()
    empty = w1_a.new_empty(0)
    dw1_a = dw1_b = dw2_a = dw2_b = empty
    if need_w1_a or need_w2_a:
        dw1_a, dw2_a = _gradient(grad, (w1_a, w1_b), (w2_a, w2_b), scale, transposed=False)
    if need_w1_b or need_w2_b:
        dw1_b, dw2_b = _gradient(grad, (w1_b, w1_a), (w2_b, w2_a), scale, transposed=True)
    return (
        dw1_a if need_w1_a else empty,
        dw1_b if need_w1_b else empty,
        dw2_a if need_w2_a else empty,
        dw2_b if need_w2_b else empty,
    )


def _gradient(grad: Tensor, first: tuple, second: tuple, scale: float, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients in the left factor of each pair; a transposed pair is (rank, rows) and (columns, rank)."""
    (a1, b1), (a2, b2) = first, second
    along, across = (1, 0) if transposed else (0, 1)
    rows, r1, r2 = a1.shape[along], a1.shape[across], a2.shape[across]
    columns, features = b1.shape[across], (b1 if not transposed else a1).shape[1]
    block_columns = 32 if max(r1, r2) > 32 else 64
    row_tiles, column_tiles = triton.cdiv(rows, _ROWS), triton.cdiv(columns, block_columns)
    per_chunk = triton.cdiv(column_tiles, max(PROGRAMS // max(row_tiles, 1), 1))
    chunks = triton.cdiv(column_tiles, max(per_chunk, 1))
    size = rows * (r1 + r2)
    partials = torch.empty(chunks, size, dtype=torch.float32, device=grad.device)
    launch(
        _hadamard_gradient_kernel,
        (row_tiles * chunks,),
        num_warps=4,
        partials_ptr=partials,
        grad_ptr=grad,
        a1_ptr=a1,
        b1_ptr=b1,
        a2_ptr=a2,
        b2_ptr=b2,
        rows=rows,
        columns=columns,
        r1=r1,
        r2=r2,
        chunk_columns=per_chunk * block_columns,
        scale=scale,
        stride_grad_row=1 if transposed else features,
        stride_grad_column=features if transposed else 1,
        stride_a1_row=a1.stride(along),
        stride_a1_rank=a1.stride(across),
        stride_b1_column=b1.stride(across),
        stride_b1_rank=b1.stride(along),
        stride_a2_row=a2.stride(along),
        stride_a2_rank=a2.stride(across),
        stride_b2_column=b2.stride(across),
        stride_b2_rank=b2.stride(along),
        BLOCK_R1=_block(r1),
        BLOCK_R2=_block(r2),
        BLOCK_ROWS=_ROWS,
        BLOCK_COLUMNS=block_columns,
    )
    found = sum_chunks(partials, torch.Size((size,)), 1.0, a1.dtype)
    return found[: rows * r1].view(a1.shape), found[rows * r1 :].view(a2.shape)
