"""Convolutions of a frozen layer's geometry with other weights, in one, two or three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tf
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from ..kernels.shared.wide import HALF, widened
from ..runtime import registry
from ._autograd import run_backward, transformed, vjp

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: tf.conv1d, 4: tf.conv2d, 5: tf.conv3d}
"""What convolves with a weight of so many dimensions."""
_INPUT: dict[int, Callable[..., Tensor]] = {3: conv1d_input, 4: conv2d_input, 5: conv3d_input}


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any) -> Tensor:
    """Convolve in as many dimensions as the weight has; the geometry is stride, padding, dilation and groups."""
    return _CONVOLVE[weight.dim()](x, weight, bias, *geometry)


def convolve(base: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Convolve with another weight, with the stride, padding, padding mode and dilation of `base`.

    Args:
        base: The layer whose geometry is used; its own weight, bias and groups are not.
        x: (batch, in, *size) or (in, *size).
        weight: (any, in / groups, *kernel).
        bias: (any,) or None.
        groups: The number of groups.
    """
    x, padding = _padded(base, x)
    return convolution(x, weight, bias, base.stride, padding, base.dilation, groups)


def convolve_with(
    derive: Callable[..., Tensor],
    base: Convolution,
    x: Tensor,
    *values: Tensor,
    plain: tuple[Tensor, Tensor | None] | None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Run a convolution with the weight ``derive(weight, *values)``.

    A plain base layer is not called, and the derived weight is not kept for the backward pass but computed again. Any
    other is called with the derived weight in place of its own, so that hooks and subclasses keep working.

    Args:
        derive: A deterministic function, differentiable in `values`, that does not change its arguments.
        base: The layer.
        x: Its input.
        *values: The tensors that the weight is derived with.
        plain: The layer's weight and bias, if its call may be left out.
        args: Further arguments of the layer.
        kwargs: Its keyword arguments.

    Raises:
        TypeError: The base weight is computed from other parameters, and the call is observed or replaced.
    """
    # A compiler decides itself what it keeps.
    if plain is not None and not transformed() and x.dim() == plain[0].dim():
        x, padding = _padded(base, x)
        return registry.apply(
            _ConvolveWith, derive, (base.stride, padding, base.dilation, base.groups), x, *plain, *values
        )
    return _called_with(base, derive(base.weight, *values), x, *args, **(kwargs or {}))


def _called_with(base: Convolution, weight: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call a layer with another weight in place of its own."""
    own = base.__dict__
    if "weight" in own:
        # FSDP keeps a view there, which hides the parameter.
        kept, own["weight"] = own["weight"], weight
        try:
            return base(x, *args, **kwargs)
        finally:
            own["weight"] = kept
    if "weight" in base._parameters:
        return torch.func.functional_call(base, {"weight": weight}, (x, *args), kwargs)
    if (
        type(base).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
        or base._forward_hooks
        or base._forward_pre_hooks
    ):
        raise TypeError(
            "base_layer: its weight is computed from other parameters, and its call is observed or replaced; remove "
            "the parametrization, or the hooks"
        )
    return convolve(base, x, weight, base.bias, base.groups)


def convolution_beside(derive: Callable[..., Tensor], base: Convolution, x: Tensor, *values: Tensor) -> Tensor:
    """Convolve with the weight ``derive(weight, *values)`` alone, without bias, beside the base layer's own call.

    The derived weight is not kept for the backward pass but computed again. The arguments are those of `convolve_with`;
    `derive` must not depend on what is in the weight.
    """
    weight = base.weight.detach()
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    if transformed() or autocast or x.dim() != weight.dim() or x.dtype is not weight.dtype:
        return convolve(base, x, derive(weight, *values), None, base.groups)
    x, padding = _padded(base, x)
    return registry.apply(
        _ConvolveWith, derive, (base.stride, padding, base.dilation, base.groups), x, weight, None, *values
    )


def convolve_frozen(base: Convolution, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with a weight that is not trained, in the geometry of `base`, without bias and without keeping x."""
    if transformed() or weight.requires_grad or x.dim() != weight.dim():
        return convolve(base, x, weight, None, base.groups)
    x, padding = _padded(base, x)
    return registry.apply(_Frozen, (base.stride, padding, base.dilation, base.groups), x, weight)


def expand(base: Tensor, hidden: Tensor, b: Tensor, scale: float, in_place: bool) -> Tensor:
    """Return ``base + scale * B h`` place by place.

    Args:
        base: (batch, out, *size); overwritten where `in_place`.
        hidden: (batch, rank, *size).
        b: (out, rank).
        scale: The factor.
        in_place: Whether nobody else reads `base`.
    """
    return registry.apply(_Expand, base, hidden, b, scale, in_place and not torch._C._are_functorch_transforms_active())


def channels_last(x: Tensor) -> bool:
    """Whether the channels of a batch stand next to each other in memory, and not the places."""
    return x.movedim(1, -1).is_contiguous() and not x.is_contiguous()


def _padded(base: Convolution, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input, padded if the operator cannot, and the padding that is left to it."""
    left_and_right, nothing = base._reversed_padding_repeated_twice, (0,) * len(base.kernel_size)
    if base.padding_mode != "zeros":
        return tf.pad(x, left_and_right, mode=base.padding_mode), nothing
    if not isinstance(base.padding, str):
        return x, base.padding
    # Two numbers for each dimension, the last dimension first.
    before, after = left_and_right[::2], left_and_right[1::2]
    return (x, tuple(reversed(before))) if before == after else (tf.pad(x, left_and_right), nothing)


class _Frozen(torch.autograd.Function):
    """A convolution that saves its weight alone."""

    @staticmethod
    def forward(geometry: tuple[Any, ...], x: Tensor, weight: Tensor) -> Tensor:
        return _CONVOLVE[weight.dim()](x, weight, None, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.geometry, x, weight = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        dx = run_backward(_INPUT[weight.dim()], ctx.shape, weight, grad, *ctx.geometry)
        return None, dx, None


class _ConvolveWith(torch.autograd.Function):
    """A convolution whose weight is derived again for the backward pass."""

    @staticmethod
    def forward(
        derive: Callable[..., Any],
        geometry: tuple[Any, ...],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *values: Tensor,
    ) -> Tensor:
        return _CONVOLVE[weight.dim()](x, derive(weight, *values), bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.derive, ctx.geometry, x, weight, _bias, *values = inputs
        ctx.save_for_backward(x, weight, *values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[2], ctx.needs_input_grad[4], ctx.needs_input_grad[5:]
        dx, dbias, *found = run_backward(_gradients, ctx.derive, ctx.geometry, needs, grad, *ctx.saved_tensors)
        return None, None, dx, None, dbias, *found


def _gradients(
    derive: Callable[..., Any],
    geometry: tuple[Any, ...],
    needs: tuple[Any, ...],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *values: Tensor,
) -> tuple[Any, ...]:
    need_x, need_bias, need_values = needs
    wanted = [value for value, need in zip(values, need_values, strict=True) if need]

    def derived(*chosen: Tensor) -> list[Tensor]:
        if len(chosen) < len(values):
            rest = iter(chosen)
            chosen = tuple(next(rest) if need else value for value, need in zip(values, need_values, strict=True))
        # In float32 at least, so that the gradient of the weight is not rounded on its way to the values.
        return [derive(widened(weight), *chosen)]

    (used,), pull = vjp(derived, wanted, registry.is_differentiable())
    dx, dweight, dbias = _convolution_gradients(
        grad, x, used.to(x.dtype), geometry, need_x, any(need_values), need_bias
    )
    found = iter(() if dweight is None else pull([dweight]))
    return dx, dbias, *(next(found) if need else None for need in need_values)


def _convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, ...], need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of a convolution; those that are sums over images are not rounded to half precision."""
    stride, padding, dilation, groups = geometry
    rest = [len(weight)], stride, padding, dilation, False, [0] * (weight.dim() - 2), groups
    if x.dtype not in HALF or not need_weight:
        return torch.ops.aten.convolution_backward(grad, x, weight, *rest, (need_x, need_weight, need_bias))
    dx, _, dbias = torch.ops.aten.convolution_backward(grad, x, weight, *rest, (need_x, False, need_bias))
    wide = grad.float(), x.float(), weight.float()
    dweight = torch.ops.aten.convolution_backward(*wide, *rest, (False, True, False))[1]
    return dx, dweight, dbias


class _Thin(torch.autograd.Function):
    """A convolution with few filters in float32, which keeps the images as they are."""

    @staticmethod
    def forward(geometry: tuple[Any, ...], x: Tensor, weight: Tensor) -> Tensor:
        return convolution(x.float(), weight.float(), None, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.geometry, x, weight = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, *run_backward(_thin_gradients, ctx.geometry, ctx.needs_input_grad[1:], grad, *ctx.saved_tensors)


def _thin_gradients(
    geometry: tuple[Any, ...], needs: tuple[bool, bool], grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Any, ...]:
    found = _convolution_gradients(grad, x.float(), weight.float(), geometry, *needs, False)
    return tuple(None if t is None else t.to(like.dtype) for t, like in zip(found, (x, weight), strict=False))


def convolve_thin(base: Convolution, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with few filters, in float32 on half-precision input, in the geometry of `base` without groups."""
    if x.dtype not in HALF:
        return convolve(base, x, weight.to(x.dtype))
    x, padding = _padded(base, x)
    geometry = base.stride, padding, base.dilation, 1
    if transformed():
        return convolution(x.float(), weight.float(), None, *geometry)
    return registry.apply(_Thin, geometry, x, weight)


class _Expand(torch.autograd.Function):
    """``base + scale * B h`` place by place; `base` is overwritten where `in_place`. h and b may be wider than it."""

    @staticmethod
    def forward(base: Tensor, h: Tensor, b: Tensor, scale: float, in_place: bool) -> Tensor:
        h, b = h.to(base.dtype), b.to(base.dtype)
        last = channels_last(base)
        if not in_place or not (last or base.is_contiguous()):
            # Not a view of what is computed: autograd lets nobody write to a view later.
            base = base.clone(memory_format=torch.preserve_format if last else torch.contiguous_format)
        if last:
            rows, hidden = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (base, h))
            rows.addmm_(hidden, b.mT, alpha=scale)
        else:
            base.flatten(2).baddbmm_(b.expand(len(base), -1, -1), h.flatten(2), alpha=scale)
        return base

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        base, h, b, ctx.scale, _ = inputs
        if output is base:
            ctx.mark_dirty(base)
        ctx.save_for_backward(h, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        h, b = ctx.saved_tensors
        need_base, need_h, need_b = ctx.needs_input_grad[:3]
        # Sums over places, and what they are sums of, are never rounded to half precision.
        planes = widened(grad.flatten(2))
        dh = (widened(b).mT @ planes * ctx.scale).view(h.shape).to(h.dtype) if need_h else None
        db = (planes @ widened(h.flatten(2)).mT).sum(0).mul_(ctx.scale).to(b.dtype) if need_b else None
        return grad if need_base else None, dh, db, None, None
