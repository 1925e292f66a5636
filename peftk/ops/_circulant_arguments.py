"""The arguments of the circular convolution: what is checked, and how they reach the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import (
    LARGEST_SCALE,
    autocast_input,
    cast,
    check_frozen,
    check_scale,
    check_scale_tensor,
    check_shape,
    check_tensor,
    fold_zero,
)
from .plain import ordinary

Scale = float | Tensor


def _check_kernel(kernel: Tensor, like: Tensor) -> None:
    check_tensor("kernel", kernel, like=like)
    if kernel.dim() != 3 or 0 in kernel.shape:
        raise ValueError(f"kernel: expected shape (out / b, in / b, b) with no size 0; got {tuple(kernel.shape)}")


def _check_conv(x: Tensor, kernel: Tensor) -> None:
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least 1 dimension (..., in_features); got a 0-dimensional tensor")
    _check_kernel(kernel, x)
    _, blocks, size = kernel.shape
    if x.shape[-1] != blocks * size:
        raise ValueError(
            f"kernel: expected shape (out_features / b, in_features / b, b) with in_features = {x.shape[-1]}, the last "
            f"size of x; got {tuple(kernel.shape)}, which has {blocks} * {size} = {blocks * size}"
        )


def _check_add(base: Tensor, x: Tensor, kernel: Tensor) -> None:
    _check_conv(x, kernel)
    check_tensor("base", base, like=x)
    check_shape("base", base, (*x.shape[:-1], kernel.shape[0] * kernel.shape[2]), "(..., out_features)")


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor) -> None:
    _check_conv(x, kernel)
    check_tensor("weight", weight, like=x)
    check_frozen("weight", weight)
    check_shape("weight", weight, (kernel.shape[0] * kernel.shape[2], x.shape[-1]), "(out_features, in_features)")
    if bias is not None:
        check_tensor("bias", bias, like=x)
        check_shape("bias", bias, (weight.shape[0],), "(out_features,)")


def _fits_conv(x: Tensor, kernel: Tensor) -> bool:
    """Say cheaply whether the arguments are right; `_check_conv` finds out what is wrong."""
    try:
        out_blocks, in_blocks, size = kernel.shape
        return 0 < in_blocks * size == x.shape[-1] and out_blocks > 0 and ordinary(x, kernel)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _fits_add(base: Tensor, x: Tensor, kernel: Tensor) -> bool:
    """Say cheaply whether the arguments are right; `_check_add` finds out what is wrong."""
    try:
        return (
            _fits_conv(x, kernel)
            and base.shape == (*x.shape[:-1], kernel.shape[0] * kernel.shape[2])
            and ordinary(x, base)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _fits_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor) -> bool:
    """Say cheaply whether the arguments are right; `_check_linear` finds out what is wrong."""
    try:
        out = kernel.shape[0] * kernel.shape[2]
        return (
            _fits_conv(x, kernel)
            and weight.shape == (out, x.shape[-1])
            and not weight.requires_grad
            and (bias is None or bias.shape == (out,))
            and ordinary(x, weight, bias)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _prepare_scale(x: Tensor, kernel: Tensor, scale: Scale) -> tuple[Tensor, float]:
    """Return the kernel and a Python scale; a scale that is a tensor is multiplied into the kernel."""
    if type(scale) is float and -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        return fold_zero(kernel, scale)
    if not isinstance(scale, Tensor):
        return fold_zero(kernel, check_scale(scale, x.dtype))
    return kernel * check_scale_tensor(scale, kernel).to(kernel.dtype), 1.0


def _kernel_like(x: Tensor, kernel: Tensor) -> Tensor:
    # float64 activations take a float64 kernel and the reverse; everything else adds up in float32 inside.
    return cast(kernel, x.dtype) if x.dtype is torch.float64 or kernel.dtype is torch.float64 else kernel


def prepare_conv(x: Tensor, kernel: Tensor, scale: Scale = 1.0) -> tuple[Any, ...]:
    """Return the arguments of the operator behind `circular_conv`."""
    if not _fits_conv(x, kernel):
        _check_conv(x, kernel)
    kernel, scale = _prepare_scale(x, kernel, scale)
    x = autocast_input(x)
    return x, _kernel_like(x, kernel), scale


def prepare_add(base: Tensor, x: Tensor, kernel: Tensor, scale: Scale = 1.0) -> tuple[Any, ...]:
    """Return the arguments of the operator behind `circular_conv_add`."""
    if not _fits_add(base, x, kernel):
        _check_add(base, x, kernel)
    return base, *prepare_conv(x, kernel, scale)


def prepare_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor, scale: Scale = 1.0
) -> tuple[Any, ...]:
    """Return the arguments of the operator behind `circulant_linear`."""
    if not _fits_linear(x, weight, bias, kernel):
        _check_linear(x, weight, bias, kernel)
    x, kernel, scale = prepare_conv(x, kernel, scale)
    return x, cast(weight, x.dtype), cast(bias, x.dtype), kernel, scale


def prepare_weight(weight: Tensor, kernel: Tensor, scale: Scale = 1.0) -> tuple[Any, ...]:
    """Return the arguments of the operator behind `circulant_weight`."""
    check_tensor("weight", weight)
    _check_kernel(kernel, weight)
    out_blocks, in_blocks, size = kernel.shape
    check_shape("weight", weight, (out_blocks * size, in_blocks * size), "(out_features, in_features) of the kernel")
    kernel, scale = _prepare_scale(weight, kernel, scale)
    return weight, _kernel_like(weight, kernel), scale
