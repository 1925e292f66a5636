"""Products of the four factors of LoHa in C++ on the CPU; writing the weight, and its gradients, in CUDA too."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C  # noqa: F401 - importing it registers the operators of peftk_native
from ..shared.hadamard import Needs
from ._bare import bare
from ._supports import device_reason, supports_activations

# Looked up once: the look-up of an operator by name costs as much as a small kernel.
_khatri_rao = torch.ops.peftk_native.khatri_rao.default
_khatri_rao_backward = torch.ops.peftk_native.khatri_rao_backward.default
_weight = torch.ops.peftk_native.hadamard_weight.default
_weight_backward = torch.ops.peftk_native.hadamard_weight_backward.default


few = bare(torch.ops.peftk_native.hadamard_few.default)
"""``few(x, weight, bias, w1_a, w1_b, w2_a, w2_b, scale, most)`` returns the output of a layer with one adapter for few
rows, in one pass over the weight; None where that is not the way, as the functions of `few_rows` do.
"""

rows = bare(torch.ops.peftk_native.hadamard_rows.default)
"""``rows(x, w1_a, w1_b, w2_a, w2_b, scale, out)`` writes ``scale * x @ ((w1_a @ w1_b) * (w2_a @ w2_b)).T`` of few rows,
float32 or bfloat16, to a float32 `out`.
"""


def _reason(large: Tensor, factor: Tensor) -> str | None:
    if factor.dtype is torch.float64:
        return f"the C++ kernels take factors of float32 and less; got {factor.dtype}"
    return supports_activations(large)


def _floats(*factors: Tensor) -> tuple[Tensor, ...]:
    return tuple(f if f.dtype is torch.float32 and f.is_contiguous() else f.float().contiguous() for f in factors)


def _like(factors: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor]:
    """Return room for the gradients of float32 factors; none for one not needed."""
    return [f.new_empty(f.shape if n else 0) for f, n in zip(factors, needs, strict=True)]


def khatri_rao_supports(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, dtype: torch.dtype | None
) -> str | None:
    """Return None, or why C++ cannot compute the factors."""
    if dtype not in (None, torch.float32, torch.bfloat16):
        return f"the C++ kernels make float32 and bfloat16; got dtype={dtype}"
    return _reason(w1_a, w1_a)


def khatri_rao(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the factors of rank r1 * r2; see `peftk.functional.khatri_rao`."""
    dtype = w1_a.dtype if dtype is None else dtype
    rank = w1_a.shape[1] * w2_a.shape[1]
    a = w1_a.new_empty(rank, w1_b.shape[1], dtype=dtype)
    b = w1_a.new_empty(w1_a.shape[0], rank, dtype=dtype)
    _khatri_rao(*_floats(w1_a, w1_b, w2_a, w2_b), a, b)
    return a, b


def khatri_rao_backward_supports(grad_a: Tensor, grad_b: Tensor, w1_a: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    if grad_b.dtype is not grad_a.dtype:
        return f"the C++ kernels take gradients of one dtype; got {grad_a.dtype} and {grad_b.dtype}"
    return _reason(grad_a, w1_a)


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
    factors = _floats(w1_a, w1_b, w2_a, w2_b)
    found = _like(factors, Needs(*needs))
    _khatri_rao_backward(grad_a.contiguous(), grad_b.contiguous(), *factors, *found)
    dw1_a, dw1_b, dw2_a, dw2_b = (f.to(w1_a.dtype) for f in found)
    return dw1_a, dw1_b, dw2_a, dw2_b


def hadamard_weight_supports(weight: Tensor, w1_a: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot write the weight."""
    if not weight.is_cuda or w1_a.dtype is torch.float64:
        return _reason(weight, w1_a)
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the CUDA kernels take float32, bfloat16 and float16; got {weight.dtype}"
    return device_reason(weight)


def hadamard_weight(weight: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float) -> Tensor:
    """Return ``weight + scale * (w1_a @ w1_b) * (w2_a @ w2_b)``; see `peftk.functional.hadamard_weight`."""
    weight = weight.contiguous()
    out = torch.empty_like(weight)
    _weight(weight, *_floats(w1_a, w1_b, w2_a, w2_b), scale, out)
    return out


def hadamard_weight_backward_supports(grad: Tensor, w1_a: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    return hadamard_weight_supports(grad, w1_a)


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
    factors = _floats(w1_a, w1_b, w2_a, w2_b)
    found = _like(factors, Needs(*needs))
    _weight_backward(grad.contiguous(), *factors, scale, *found)
    dw1_a, dw1_b, dw2_a, dw2_b = (f.to(w1_a.dtype) for f in found)
    return dw1_a, dw1_b, dw2_a, dw2_b
