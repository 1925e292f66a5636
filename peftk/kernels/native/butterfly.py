"""Butterfly products in C++ on the CPU and in CUDA, and the scale of channels in C++ on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from ... import _C  # noqa: F401 - importing it registers the operators of peftk_native
from ..shared.butterfly import multiply, multiply_backward, passes
from ._supports import device_reason, supports_activations
from .block_diagonal import block_rotate, block_rotate_backward, block_rotate_supports

# Looked up once: the look-up of an operator by name costs as much as a small kernel.
_compose = torch.ops.peftk_native.butterfly_compose.default
_compose_backward = torch.ops.peftk_native.butterfly_compose_backward.default
_scale = torch.ops.peftk_native.scale_channels.default
_scale_backward = torch.ops.peftk_native.scale_channels_backward.default

CUDA_GROUP = 64
"""Largest group of features that the CUDA kernels hold in shared memory; Triton has larger ones."""


def _supports(factors: Tensor, stages: int) -> str | None:
    if factors.dtype is not torch.float32:
        return f"the C++ kernels take float32 factors; got {factors.dtype}"
    group = factors.shape[-1] << (stages - 1)
    if factors.is_cuda and group > CUDA_GROUP:
        return f"the CUDA kernels take groups of up to {CUDA_GROUP} features; got {group}"
    return device_reason(factors)


def butterfly_compose_supports(factors: Tensor) -> str | None:
    """Return None, or why C++ cannot multiply the stages out."""
    return _supports(factors, len(factors))


def butterfly_compose(factors: Tensor) -> Tensor:
    """See `peftk.functional.butterfly_compose`."""
    stages, count, size, _ = factors.shape
    group = size << (stages - 1)
    out = factors.new_empty(count >> (stages - 1), group, group)
    _compose(factors.contiguous(), out)
    return out


def butterfly_compose_backward_supports(grad: Tensor, factors: Tensor) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    return _supports(factors, len(factors))


def butterfly_compose_backward(grad: Tensor, factors: Tensor) -> Tensor:
    """Return the gradient of `butterfly_compose` in the factors."""
    factors = factors.contiguous()
    out = torch.empty_like(factors)
    _compose_backward(grad.contiguous(), factors, out)
    return out


def _multiply_supports(x: Tensor, factors: Tensor) -> str | None:
    size = factors.shape[-1]
    for first, last in passes(size, len(factors)):
        group = size << (last - first - 1)
        if reason := _supports(factors, last - first) or block_rotate_supports(
            x, SimpleNamespace(shape=(1, group, group))
        ):
            return reason
    return None


def butterfly_multiply_supports(x: Tensor, factors: Tensor) -> str | None:
    """Return None, or why C++ cannot multiply x."""
    return _multiply_supports(x, factors)


def butterfly_multiply(x: Tensor, factors: Tensor) -> Tensor:
    """See `peftk.functional.butterfly_multiply`."""
    return multiply(x, factors, butterfly_compose, block_rotate)[0]


def butterfly_multiply_backward_supports(grad: Tensor, x: Tensor, factors: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    return _multiply_supports(grad, factors)


def butterfly_multiply_backward(
    grad: Tensor, x: Tensor, factors: Tensor, need_x: bool, need_factors: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `butterfly_multiply` in x and in the factors; an empty tensor for one not needed."""
    return multiply_backward(
        *(grad, x, factors, need_x, need_factors),
        *(butterfly_compose, butterfly_compose_backward, block_rotate, block_rotate_backward),
    )


def _vector(value: Tensor) -> Tensor:
    if value.dtype is torch.float32 and value.is_contiguous():
        return value
    return value.float().contiguous()


def scale_channels_supports(x: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot scale x."""
    return supports_activations(x)


def scale_channels(x: Tensor, scale: Tensor, bias: Tensor | None, inner: int) -> Tensor:
    """See `peftk.functional.scale_channels`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _scale(x, _vector(scale), None if bias is None else _vector(bias), inner, out)
    return out


def scale_channels_backward_supports(grad: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    return supports_activations(grad)


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
    vector, grad = _vector(scale), grad.contiguous()
    dx = grad.new_empty(grad.shape if need_x else 0)
    dscale = vector.new_empty(vector.shape if need_scale else 0)
    dbias = vector.new_empty(vector.shape if need_bias else 0)
    _scale_backward(grad, x.contiguous(), vector, None if bias is None else _vector(bias), inner, dx, dscale, dbias)
    return dx, dscale.to(scale.dtype), dbias.to((grad if bias is None else bias).dtype)
