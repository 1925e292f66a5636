"""The factors of LoHa's low-rank product in Triton, and their gradients.

Both halves of the Khatri-Rao product are one kernel, called with other strides. The factors are small and stay in
their own dtype; every product of them is computed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.shared.hadamard import Needs
from ._launch import launch, unsupported

MAX_RANK = 64
"""Largest rank of the gradient of `khatri_rao`, whose tile holds all of it."""


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
    # [1, BLOCK_FEATURES]
    feature = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    pair = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)[:, None]  # [BLOCK_RANK, 1]
    mask = (pair < rank) & (feature < features)  # [BLOCK_RANK, BLOCK_FEATURES]
    left = tl.load(
        left_ptr + pair // right_rank * stride_left_rank + feature * stride_left_feature, mask=mask, other=0.0
    )  # [BLOCK_RANK, BLOCK_FEATURES]
    right = tl.load(
        right_ptr + pair % right_rank * stride_right_rank + feature * stride_right_feature, mask=mask, other=0.0
    )  # [BLOCK_RANK, BLOCK_FEATURES]
    product = left.to(tl.float32) * right.to(tl.float32)  # [BLOCK_RANK, BLOCK_FEATURES]
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
    # [1, BLOCK_FEATURES]
    feature = tl.program_id(0).to(tl.int64) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    j = tl.arange(0, BLOCK_RANK)[:, None]  # [BLOCK_RANK, 1]
    mask = (j < right_rank) & (feature < features)  # [BLOCK_RANK, BLOCK_FEATURES]
    right_at = j * stride_right_rank + feature * stride_right_feature  # [BLOCK_RANK, BLOCK_FEATURES]
    right = tl.load(right_ptr + right_at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_RANK, BLOCK_FEATURES]
    sums = tl.zeros((BLOCK_RANK, BLOCK_FEATURES), tl.float32)  # [BLOCK_RANK, BLOCK_FEATURES]
    # Not pipelined: Triton 3.7 was reported to miscompile a store inside a pipelined loop.
    for i in tl.range(0, left_rank, num_stages=1):
        grad = tl.load(
            grad_ptr + (i * right_rank + j).to(tl.int64) * stride_grad_rank + feature * stride_grad_feature,
            mask=mask,
            other=0.0,
        ).to(tl.float32)  # [BLOCK_RANK, BLOCK_FEATURES]
        left_at = i * stride_left_rank + feature * stride_left_feature  # [1, BLOCK_FEATURES]
        if NEED_RIGHT:
            sums += grad * tl.load(left_ptr + left_at, mask=feature < features, other=0.0).to(tl.float32)
        if NEED_LEFT:
            dleft = tl.sum(grad * right, axis=0)[None, :]  # [1, BLOCK_FEATURES]
            tl.store(dleft_ptr + left_at, dleft.to(dleft_ptr.dtype.element_ty), mask=feature < features)
    if NEED_RIGHT:
        tl.store(dright_ptr + right_at, sums.to(dright_ptr.dtype.element_ty), mask=mask)


def reason(large: Tensor, factor: Tensor) -> str | None:
    """Return None, or why kernels that read a large tensor and a factor cannot run."""
    if factor.dtype is torch.float64:
        return f"the Triton kernels take float32, float16 and bfloat16; got {factor.dtype}"
    return unsupported(large)


def contiguous(*factors: Tensor) -> tuple[Tensor, ...]:
    """Return the factors with contiguous rows."""
    return tuple(f.contiguous() for f in factors)


def _config(rank_first: bool) -> dict[str, int]:
    """Return a tile of 2,048 elements, long where memory runs along; no timing picked it."""
    rank, features = (8, 256) if rank_first else (64, 32)
    return {"BLOCK_RANK": rank, "BLOCK_FEATURES": features, "num_warps": 4}


def _backward_config(right_rank: int) -> dict[str, int]:
    """Return a tile of 2,048 elements that holds all of the right rank; no timing picked it."""
    block = max(16, triton.next_power_of_2(right_rank))
    return {"BLOCK_RANK": block, "BLOCK_FEATURES": 2048 // block, "num_warps": 4}


def khatri_rao_supports(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, dtype: torch.dtype | None
) -> str | None:
    """Return None, or why Triton cannot compute the factors."""
    if dtype is torch.float64:
        return f"the Triton kernels take float32, float16 and bfloat16; got {dtype}"
    return reason(w1_a, w1_a)


def khatri_rao(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the factors of rank r1 * r2; see `peftk.functional.khatri_rao`."""
    dtype = w1_a.dtype if dtype is None else dtype
    w1_a, w1_b, w2_a, w2_b = contiguous(w1_a, w1_b, w2_a, w2_b)
    (out, r1), r2, features = w1_a.shape, w2_a.shape[1], w1_b.shape[1]
    rank = r1 * r2
    a = torch.empty(rank, features, dtype=dtype, device=w1_a.device)
    b = torch.empty(out, rank, dtype=dtype, device=w1_a.device)

    def write(
        result: Tensor, left: Tensor, right: Tensor, length: int, strides: dict[str, int], config: dict[str, int]
    ) -> None:
        launch(
            _khatri_rao_kernel,
            (triton.cdiv(length, config["BLOCK_FEATURES"]) * triton.cdiv(rank, config["BLOCK_RANK"]),),
            out_ptr=result,
            left_ptr=left,
            right_ptr=right,
            features=length,
            rank=rank,
            right_rank=r2,
            **config,
            **strides,
        )

    rank_first = {"stride_out_rank": features, "stride_left_rank": features, "stride_right_rank": features}
    write(a, w1_b, w2_b, features, _strides(rank_first, 1), _config(True))
    rank_last = {"stride_out_feature": rank, "stride_left_feature": r1, "stride_right_feature": r2}
    write(b, w1_a, w2_a, out, _strides(rank_last, 1), _config(False))
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
    if max(w1_a.shape[1], w2_a.shape[1]) > MAX_RANK:
        return f"the Triton kernels take ranks of up to {MAX_RANK}; got {max(w1_a.shape[1], w2_a.shape[1])}"
    return reason(grad_a, w1_a) or unsupported(grad_b)


def khatri_rao_backward(
    grad_a: Tensor,
    grad_b: Tensor,
    w1_a: Tensor,
    w1_b: Tensor,
    w2_a: Tensor,
    w2_b: Tensor,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in the four factors; an empty tensor for one not needed."""
    need = Needs(*needs)
    w1_a, w1_b, w2_a, w2_b = contiguous(w1_a, w1_b, w2_a, w2_b)
    (out, r1), r2, features = w1_a.shape, w2_a.shape[1], w1_b.shape[1]
    config = _backward_config(r2)

    def half(
        grad: Tensor,
        left: Tensor,
        right: Tensor,
        length: int,
        strides: dict[str, int],
        need_left: bool,
        need_right: bool,
    ) -> tuple[Tensor, Tensor]:
        dleft = torch.empty(left.shape if need_left else 0, dtype=left.dtype, device=left.device)
        dright = torch.empty(right.shape if need_right else 0, dtype=right.dtype, device=right.device)
        if need_left or need_right:
            launch(
                _khatri_rao_backward_kernel,
                (triton.cdiv(length, config["BLOCK_FEATURES"]),),
                dleft_ptr=dleft if need_left else left,
                dright_ptr=dright if need_right else right,
                grad_ptr=grad.contiguous(),
                left_ptr=left,
                right_ptr=right,
                features=length,
                left_rank=r1,
                right_rank=r2,
                **config,
                NEED_LEFT=need_left,
                NEED_RIGHT=need_right,
                **strides,
            )
        return dleft, dright

    rank_first = {"stride_grad_rank": features, "stride_left_rank": features, "stride_right_rank": features}
    dw1_b, dw2_b = half(grad_a, w1_b, w2_b, features, _strides(rank_first, 1), need.w1_b, need.w2_b)
    rank_last = {"stride_grad_feature": r1 * r2, "stride_left_feature": r1, "stride_right_feature": r2}
    dw1_a, dw2_a = half(grad_b, w1_a, w2_a, out, _strides(rank_last, 1), need.w1_a, need.w2_a)
    return dw1_a, dw1_b, dw2_a, dw2_b
