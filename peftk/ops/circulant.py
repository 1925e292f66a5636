"""Block-circular convolution, the adapter of C3A: of activations, beside a frozen linear layer, and as a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime import registry
from ..runtime.timings import power_bucket
from ._autograd import run_backward
from ._circulant_arguments import Scale, prepare_add, prepare_conv, prepare_linear, prepare_weight
from ._few_rows import ORDINARY, module_of, rows_of_one_pass

__all__ = ["circulant_linear", "circulant_weight", "circular_conv", "circular_conv_add"]


def _conv_flops(rows: int, kernel: torch.Size) -> int:
    """Count the operations in real arithmetic: two transforms as products, and four products a complex number."""
    out_blocks, in_blocks, size = kernel
    return 2 * rows * size * size * (in_blocks + out_blocks) + 4 * rows * out_blocks * in_blocks * size


def _leading(x: torch.Size) -> int:
    return x.numel() // max(x[-1], 1)


def _linear_flops(
    x: torch.Size, weight: torch.Size, _bias: object, kernel: torch.Size, *_args: object, **_kw: object
) -> int:
    return 2 * x.numel() * weight[0] + _conv_flops(_leading(x), kernel)


def _backward_flops(
    grad: torch.Size, x: torch.Size, kernel: torch.Size, _scale: object, need_x: bool, need_kernel: bool, **_kw: object
) -> int:
    return _conv_flops(_leading(x), kernel) * (need_x + need_kernel)


def _linear_backward_flops(
    grad: torch.Size, x: torch.Size, weight: torch.Size, kernel: torch.Size, scale: object, *needs: bool, **_kw: object
) -> int:
    product = 2 * grad.numel() * weight[1] * needs[0]
    return product + _backward_flops(grad, x, kernel, scale, *needs[:2])


def _bucket(x: Tensor, kernel: Tensor) -> tuple[Any, ...]:
    out_blocks, in_blocks, size = kernel.shape
    return power_bucket(_leading(x.shape), out_blocks * size, in_blocks * size, size)


def _out_shape(x: Tensor, kernel: Tensor) -> tuple[Any, ...]:
    return (*x.shape[:-1], kernel.shape[0] * kernel.shape[2])


def _gradients(x: Tensor, kernel: Tensor, need_x: bool, need_kernel: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), kernel.new_empty(kernel.shape if need_kernel else 0)


_conv = registry.define(
    "circulant",
    "circular_conv(Tensor x, Tensor kernel, float scale) -> Tensor",
    fake=lambda x, kernel, scale: x.new_empty(_out_shape(x, kernel)),
    flops=lambda x, kernel, *_, **__: _conv_flops(_leading(x), kernel),
    bucket=lambda x, kernel, scale: _bucket(x, kernel),
    on_gpus=registry.TRITON_FIRST,
    prepare=prepare_conv,
)

_add = registry.define(
    "circulant",
    "circular_conv_add(Tensor base, Tensor x, Tensor kernel, float scale) -> Tensor",
    fake=lambda base, x, kernel, scale: base.new_empty(base.shape),
    flops=lambda base, x, kernel, *_, **__: _conv_flops(_leading(x), kernel),
    bucket=lambda base, x, kernel, scale: _bucket(x, kernel),
    on_gpus=registry.TRITON_FIRST,
    prepare=prepare_add,
)

_conv_backward, _add_backward = (
    registry.define(
        "circulant",
        f"{name}_backward(Tensor grad, Tensor x, Tensor kernel, float scale, bool need_x, bool need_kernel)"
        " -> (Tensor, Tensor)",
        fake=lambda grad, x, kernel, scale, *needs: _gradients(x, kernel, *needs),
        flops=_backward_flops,
        bucket=lambda grad, x, kernel, *_: _bucket(x, kernel),
        on_gpus=registry.TRITON_FIRST,
    )
    for name in ("circular_conv", "circular_conv_add")
)

_linear = registry.define(
    "circulant",
    "circulant_linear(Tensor x, Tensor weight, Tensor? bias, Tensor kernel, float scale) -> Tensor",
    fake=lambda x, weight, bias, kernel, scale: x.new_empty(_out_shape(x, kernel)),
    flops=_linear_flops,
    bucket=lambda x, weight, bias, kernel, scale: _bucket(x, kernel),
    on_gpus=registry.TRITON_FIRST,
    prepare=prepare_linear,
)

_linear_backward = registry.define(
    "circulant",
    "circulant_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor kernel, float scale, bool need_x,"
    " bool need_kernel, bool need_bias) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, x, weight, kernel, scale, need_x, need_kernel, need_bias: (
        *_gradients(x, kernel, need_x, need_kernel),
        grad.new_empty(weight.shape[0] if need_bias else 0),
    ),
    flops=_linear_backward_flops,
    bucket=lambda grad, x, weight, kernel, *_: _bucket(x, kernel),
    on_gpus=registry.TRITON_FIRST,
)

_weight = registry.define(
    "circulant",
    "circulant_weight(Tensor weight, Tensor kernel, float scale) -> Tensor",
    fake=lambda weight, kernel, scale: weight.new_empty(weight.shape),
    flops=lambda weight, kernel, *_, **__: 2 * weight.numel(),
    bucket=lambda weight, kernel, scale: power_bucket(*weight.shape, kernel.shape[-1]),
    on_gpus=registry.TRITON_FIRST,
    prepare=prepare_weight,
)

_weight_backward = registry.define(
    "circulant",
    "circulant_weight_backward(Tensor grad, Tensor kernel, float scale) -> Tensor",
    fake=lambda grad, kernel, scale: kernel.new_empty(kernel.shape),
    flops=lambda grad, kernel, *_, **__: grad.numel(),
    bucket=lambda grad, kernel, scale: power_bucket(*grad.shape, kernel.shape[-1]),
)


class CircularConv(torch.autograd.Function):
    """Autograd for `circular_conv`."""

    @staticmethod
    def forward(x: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """Run the operator."""
        return _conv(x, kernel, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x (for the kernel) and the kernel (for x)."""
        x, kernel, ctx.scale = inputs
        ctx.save_for_backward(x, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Run the backward operator."""
        x, kernel = ctx.saved_tensors
        need_x, need_kernel, _ = ctx.needs_input_grad
        dx, dkernel = run_backward(_conv_backward, grad, x, kernel, ctx.scale, need_x, need_kernel)
        return dx if need_x else None, dkernel if need_kernel else None, None


class CircularConvAdd(torch.autograd.Function):
    """Autograd for `circular_conv_add`."""

    @staticmethod
    def forward(base: Tensor, x: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """Run the operator."""
        return _add(base, x, kernel, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x and the kernel."""
        _base, x, kernel, ctx.scale = inputs
        ctx.save_for_backward(x, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Run the backward operator; the gradient of the base output is the incoming one."""
        x, kernel = ctx.saved_tensors
        need_base, need_x, need_kernel, _ = ctx.needs_input_grad
        dx = dkernel = None
        if need_x or need_kernel:
            args = grad.to(x.dtype), x, kernel, ctx.scale, need_x, need_kernel
            dx, dkernel = run_backward(_add_backward, *args)
        return grad if need_base else None, dx if need_x else None, dkernel if need_kernel else None, None


class CirculantLinear(torch.autograd.Function):
    """Autograd for `circulant_linear`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor, scale: float) -> Tensor:
        """Run the operator."""
        return _linear(x, weight, bias, kernel, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x, the kernel and a reference to the frozen weight."""
        x, weight, _bias, kernel, ctx.scale = inputs
        ctx.save_for_backward(x, weight, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Run the backward operator."""
        x, weight, kernel = ctx.saved_tensors
        need_x, _, need_bias, need_kernel, _ = ctx.needs_input_grad
        args = grad, x, weight, kernel, ctx.scale, need_x, need_kernel, need_bias
        dx, dkernel, dbias = run_backward(_linear_backward, *args)
        return dx if need_x else None, None, dbias if need_bias else None, dkernel if need_kernel else None, None


class CirculantWeight(torch.autograd.Function):
    """Autograd for `circulant_weight`."""

    @staticmethod
    def forward(weight: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """Run the operator."""
        return _weight(weight, kernel, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the kernel, for its shape and dtype."""
        _, kernel, ctx.scale = inputs
        ctx.save_for_backward(kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Run the backward operator; the gradient of the weight is the incoming one."""
        (kernel,) = ctx.saved_tensors
        need_weight, need_kernel, _ = ctx.needs_input_grad
        dkernel = run_backward(_weight_backward, grad, kernel, ctx.scale) if need_kernel else None
        return grad if need_weight else None, dkernel, None


def circulant_few(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor, scale: float) -> Tensor | None:
    """Return `circulant_linear` of few rows, `unobserved`, or None where the operator has to run."""
    module = module_of("circulant")
    if module is None or not x.is_cpu or type(x) not in ORDINARY:
        return None
    y: Tensor | None = module.few(x, weight, bias, kernel, scale, rows_of_one_pass(x.dtype))
    return y


def circular_conv(x: Tensor, kernel: Tensor, scale: Scale = 1.0) -> Tensor:
    """Multiply by a matrix of circulant blocks, given by the first row of each.

    ``y[..., m*b + p] = scale * sum_n sum_q kernel[m, n, (q - p) % b] * x[..., n*b + q]``

    Args:
        x: activations, (..., in_features), float64, float32, bfloat16 or float16.
        kernel: (out_features / b, in_features / b, b) for any b that divides both sizes; any floating dtype. Operands
            may be rounded to the dtype of x, sums are kept in at least float32.
        scale: a finite number, or a 0-dimensional tensor, which may require grad.

    Returns:
        (..., out_features) in the dtype of x (its autocast dtype under autocast).

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x and the kernel; never a spectrum.

    Source: Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv 2407.19342. The gradient in x
    that the paper's algorithm gives is not the one of its forward pass; this is.

    Example:
        >>> import peftk, torch
        >>> shift = torch.tensor([[[0.0, 1.0, 0.0]]])
        >>> peftk.functional.circular_conv(torch.tensor([1.0, 2.0, 3.0]), shift).round()
        tensor([2., 3., 1.])
    """
    return registry.apply(CircularConv, *prepare_conv(x, kernel, scale))


def circular_conv_add(base: Tensor, x: Tensor, kernel: Tensor, scale: Scale = 1.0) -> Tensor:
    """Add a circular convolution to the output of a base layer: C3A where the base layer stays a layer of its own.

    ``base + circular_conv(x, kernel, scale)``

    Args:
        base: output of the base layer, (..., out_features); it is not written to.
        x: activations, (..., in_features), float64, float32, bfloat16 or float16.
        kernel: (out_features / b, in_features / b, b), as in `circular_conv`.
        scale: as in `circular_conv`.

    Returns:
        (..., out_features) in the dtype of ``base``.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x and the kernel.

    Source: Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv 2407.19342.

    Example:
        >>> import peftk, torch
        >>> x, kernel = torch.ones(1, 4), torch.full((1, 2, 2), 0.5)
        >>> peftk.functional.circular_conv_add(torch.zeros(1, 2), x, kernel).round()
        tensor([[2., 2.]])
    """
    return registry.apply(CircularConvAdd, *prepare_add(base, x, kernel, scale))


def circulant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor, scale: Scale = 1.0) -> Tensor:
    """Apply a frozen linear layer and its C3A adapter in one operator.

    ``linear(x, weight, bias) + circular_conv(x, kernel, scale)``, which is
    ``linear(x, circulant_weight(weight, kernel, scale), bias)``; a backend takes whichever costs less. In half
    precision it is always the first: a small adapter would be lost in the rounded weight.

    Args:
        x: activations, (..., in_features), float64, float32, bfloat16 or float16.
        weight: frozen weight, (out_features, in_features).
        bias: (out_features,) or None; may require grad.
        kernel: (out_features / b, in_features / b, b), as in `circular_conv`.
        scale: a finite number, or a 0-dimensional tensor, which may require grad.

    Returns:
        (..., out_features) in the dtype of x (its autocast dtype under autocast).

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit, or if the weight requires grad.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x, the kernel and a reference to the weight.

    Source: Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv 2407.19342.

    Example:
        >>> import peftk, torch
        >>> x, weight, kernel = torch.randn(5, 4), torch.randn(6, 4), torch.zeros(3, 2, 2)
        >>> torch.equal(peftk.functional.circulant_linear(x, weight, None, kernel), x @ weight.T)
        True
    """
    return registry.apply(CirculantLinear, *prepare_linear(x, weight, bias, kernel, scale))


def circulant_weight(weight: Tensor, kernel: Tensor, scale: Scale = 1.0) -> Tensor:
    """Add a matrix of circulant blocks to a weight, as merging C3A does.

    ``out[m*b + p, n*b + q] = weight[m*b + p, n*b + q] + scale * kernel[m, n, (q - p) % b]``, written in one pass:
    no float32 matrix beside the result.

    Args:
        weight: (out_features, in_features), float64, float32, bfloat16 or float16; may require grad.
        kernel: (out_features / b, in_features / b, b), any floating dtype.
        scale: a finite number, or a 0-dimensional tensor, which may require grad.

    Returns:
        A new tensor in the shape and dtype of ``weight``, rounded once.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: the kernel.

    Source: Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv 2407.19342.

    Example:
        >>> import peftk, torch
        >>> peftk.functional.circulant_weight(torch.zeros(3, 3), torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[1., 2., 3.],
                [3., 1., 2.],
                [2., 3., 1.]])
    """
    return registry.apply(CirculantWeight, *prepare_weight(weight, kernel, scale))
