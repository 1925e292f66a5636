"""Products of the four factors of LoHa in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared.hadamard import Needs


def _common(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 where one tensor has it, else float32."""
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def khatri_rao(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the factors of rank r1 * r2; see `peftk.functional.khatri_rao`."""
    wide = _common(w1_a, w1_b, w2_a, w2_b)
    a = (w1_b.to(wide)[:, None, :] * w2_b.to(wide)[None, :, :]).flatten(0, 1)
    b = (w1_a.to(wide)[:, :, None] * w2_a.to(wide)[:, None, :]).flatten(1, 2)
    dtype = dtype or torch.promote_types(w1_a.dtype, w2_a.dtype)
    return a.to(dtype), b.to(dtype)


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
    wide = _common(w1_a, w1_b, w2_a, w2_b)
    r1, r2 = w1_b.shape[0], w2_b.shape[0]
    da = grad_a.to(wide).unflatten(0, (r1, r2))
    db = grad_b.to(wide).unflatten(1, (r1, r2))
    empty = w1_a.new_empty(0)
    return (
        (db * w2_a.to(wide)[:, None, :]).sum(2).to(w1_a.dtype) if need.w1_a else empty,
        (da * w2_b.to(wide)[None, :, :]).sum(1).to(w1_b.dtype) if need.w1_b else empty,
        (db * w1_a.to(wide)[:, :, None]).sum(1).to(w2_a.dtype) if need.w2_a else empty,
        (da * w1_b.to(wide)[:, None, :]).sum(0).to(w2_b.dtype) if need.w2_b else empty,
    )


def hadamard_weight(weight: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float) -> Tensor:
    """Return ``weight + scale * (w1_a @ w1_b) * (w2_a @ w2_b)``; see `peftk.functional.hadamard_weight`."""
    wide = _common(weight, w1_a, w1_b, w2_a, w2_b)
    delta = (w1_a.to(wide) @ w1_b.to(wide)) * (w2_a.to(wide) @ w2_b.to(wide)) * scale
    delta = delta.view(weight.shape)
    # -0.0 + 0.0 is +0.0: where nothing is added, every bit of the weight stays.
    return torch.where(delta == 0, weight, (weight + delta).to(weight.dtype)).contiguous()


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
    wide = _common(grad, w1_a, w1_b, w2_a, w2_b)
    a1, b1, a2, b2 = (t.to(wide) for t in (w1_a, w1_b, w2_a, w2_b))
    grad = grad.reshape(w1_a.shape[0], w1_b.shape[1]).to(wide) * scale
    empty = w1_a.new_empty(0)
    first = grad * (a2 @ b2) if need.w1_a or need.w1_b else empty
    second = grad * (a1 @ b1) if need.w2_a or need.w2_b else empty
    return (
        (first @ b1.mT).to(w1_a.dtype) if need.w1_a else empty,
        (a1.mT @ first).to(w1_b.dtype) if need.w1_b else empty,
        (second @ b2.mT).to(w2_a.dtype) if need.w2_a else empty,
        (a2.mT @ second).to(w2_b.dtype) if need.w2_b else empty,
    )
