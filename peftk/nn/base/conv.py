"""Convolutions of a frozen nn.Conv2d's geometry with other weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from ...ops._autograd import apply
from .adapter_layer import AdapterLayer


def convolve(base: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve with another weight, with the stride, padding, padding mode, dilation and groups of `base`.

    Args:
        base: The layer whose geometry is used; its own weight and bias are not.
        x: (batch, in, height, width) or (in, height, width).
        weight: (any, in / groups, kernel height, kernel width).
        bias: (any,) or None.
    """
    return base._conv_forward(x, weight, bias)


def convolve_with(
    derive: Callable[..., Tensor],
    layer: AdapterLayer,
    x: Tensor,
    *values: Tensor,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """Run the base convolution of a layer with the weight ``derive(weight, *values)``.

    A plain base layer is not called, and the derived weight is not kept for the backward pass but computed again. Any
    other is called with the derived weight in place of its own, so that hooks and subclasses keep working.

    Args:
        derive: A deterministic function, differentiable in `values`, that does not change its arguments.
        layer: The layer whose base layer is run.
        x: The input of the base layer.
        *values: The tensors that the weight is derived with.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.

    Raises:
        TypeError: The base weight is computed from other parameters, and the call is observed or replaced.
        RuntimeError: Later, if the result is differentiated twice.
    """
    base = layer.base_layer
    kwargs = kwargs or {}
    # Compilers and function transforms differentiate the plain formula; a compiler decides itself what it keeps.
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if layer._can_fuse(x, args, kwargs) and not transformed and x.dim() == 4:
        x, padding = _padded(base, x)
        geometry = base.stride, padding, base.dilation, base.groups
        return apply(_ConvolveWith, derive, geometry, x, base.weight, base.bias, *values)
    weight = derive(base.weight, *values)
    if "weight" in base._parameters:
        return torch.func.functional_call(base, {"weight": weight}, (x, *args), kwargs)
    if type(base).forward is not nn.Conv2d.forward or base._forward_hooks or base._forward_pre_hooks:
        raise TypeError(
            "base_layer: its weight is computed from other parameters, and its call is observed or replaced; remove "
            "the parametrization, or the hooks"
        )
    return convolve(base, x, weight, base.bias)


def convolution_beside(derive: Callable[..., Tensor], layer: AdapterLayer, x: Tensor, *values: Tensor) -> Tensor:
    """Convolve with the weight ``derive(weight, *values)`` alone, without bias, beside the base layer's own call.

    The derived weight is not kept for the backward pass but computed again. The arguments are those of `convolve_with`;
    `derive` must not depend on what is in the weight.

    Raises:
        RuntimeError: Later, if the result is differentiated twice.
    """
    base = layer.base_layer
    weight = base.weight.detach()
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    if transformed or autocast or x.dim() != 4 or x.dtype is not weight.dtype:
        return convolve(base, x, derive(weight, *values))
    x, padding = _padded(base, x)
    geometry = base.stride, padding, base.dilation, base.groups
    return apply(_ConvolveWith, derive, geometry, x, weight, None, *values)


def convolve_frozen(base: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with a weight that is not trained, without bias and without keeping x; the geometry is that of `base`.

    Raises:
        RuntimeError: Later, if the result is differentiated twice.
    """
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or weight.requires_grad or x.dim() != 4:
        return convolve(base, x, weight)
    x, padding = _padded(base, x)
    return apply(_Frozen, (base.stride, padding, base.dilation, base.groups), x, weight)


class _Frozen(torch.autograd.Function):
    """A convolution that saves its weight alone."""

    @staticmethod
    def forward(geometry: tuple, x: Tensor, weight: Tensor) -> Tensor:
        return tf.conv2d(x, weight, None, *geometry)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.geometry, x, weight = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        if torch.is_grad_enabled() and grad.requires_grad:
            raise RuntimeError("double backward is not supported through an adapted convolution")
        (weight,) = ctx.saved_tensors
        return None, torch.nn.grad.conv2d_input(ctx.shape, weight, grad, *ctx.geometry), None


def _padded(base: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input, padded if the operator cannot, and the padding that is left to it."""
    left_and_right = base._reversed_padding_repeated_twice
    if base.padding_mode != "zeros":
        return tf.pad(x, left_and_right, mode=base.padding_mode), (0, 0)
    if not isinstance(base.padding, str):
        return x, base.padding
    left, right, top, bottom = left_and_right
    return (x, (top, left)) if (left, top) == (right, bottom) else (tf.pad(x, left_and_right), (0, 0))


class _ConvolveWith(torch.autograd.Function):
    """A convolution whose weight is derived again for the backward pass."""

    @staticmethod
    def forward(derive: Callable, geometry: tuple, x: Tensor, weight: Tensor, bias: Tensor | None, *values) -> Tensor:
        return tf.conv2d(x, derive(weight, *values), bias, *geometry)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.derive, ctx.geometry, x, weight, _bias, *values = inputs
        ctx.save_for_backward(x, weight, *values)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight, *values = ctx.saved_tensors
        if torch.is_grad_enabled() and any(t.requires_grad for t in (grad, x, *values)):
            raise RuntimeError("double backward is not supported through an adapted convolution")
        need_x, need_bias, need_values = ctx.needs_input_grad[2], ctx.needs_input_grad[4], ctx.needs_input_grad[5:]
        values = [value.detach().requires_grad_(need) for value, need in zip(values, need_values, strict=True)]
        with torch.enable_grad():
            derived = ctx.derive(weight, *values)
        stride, padding, dilation, groups = ctx.geometry
        wanted = need_x, any(need_values), need_bias
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            grad, x, derived.detach(), [len(derived)], stride, padding, dilation, False, [0, 0], groups, wanted
        )
        leaves = [value for value in values if value.requires_grad]
        found = iter(torch.autograd.grad(derived, leaves, dweight) if leaves else ())
        return None, None, dx, None, dbias, *(next(found) if need else None for need in need_values)
