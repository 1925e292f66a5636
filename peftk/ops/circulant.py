"""Block-circular convolution, the adapter of C3A: of activations, beside a frozen linear layer, and as a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _registry
from .._tuning import power_bucket
from ._autograd import apply, run_backward
from ._checks import autocast_input, cast, check_frozen, check_scale, check_shape, check_tensor, ordinary

__all__ = ["circulant_linear", "circulant_weight", "circular_conv", "circular_conv_add"]


def _check_kernel(kernel: object, like: Tensor) -> None:
    check_tensor("kernel", kernel, like=like)
    if kernel.dim() != 3 or 0 in kernel.shape:
        raise ValueError(
            f"kernel: expected shape (out_features / b, in_features / b, b) with no size 0; got {tuple(kernel.shape)}"
        )


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


def _fits(x: Tensor, kernel: Tensor, *others: Tensor | None) -> bool:
    """Say cheaply whether x and the kernel are right; `_check_conv` finds out what is wrong."""
    try:
        out_blocks, in_blocks, size = kernel.shape
        return 0 < in_blocks * size == x.shape[-1] and out_blocks > 0 and ordinary(x, kernel, *others)
    except (AttributeError, IndexError, TypeError, ValueError):
        return False


def _prepare_scale(kernel: Tensor, scale: float | Tensor) -> tuple[Tensor, float]:
    """Return the kernel and a Python scale; a scale that is a tensor is multiplied into the kernel."""
    if type(scale) is float and -math.inf < scale < math.inf:
        return kernel, scale
    if not isinstance(scale, Tensor):
        return kernel, check_scale(scale)
    if scale.dim() != 0:
        raise ValueError(f"scale: expected a number or a 0-dimensional tensor; got shape {tuple(scale.shape)}")
    check_tensor("scale", scale)
    return kernel * scale.to(kernel.device, kernel.dtype), 1.0


def _kernel_like(x: Tensor, kernel: Tensor) -> Tensor:
    # float64 activations take a float64 kernel and the reverse; everything else adds up in float32 inside.
    return cast(kernel, x.dtype) if x.dtype is torch.float64 or kernel.dtype is torch.float64 else kernel


def _prepare_conv(x: Tensor, kernel: Tensor, scale: float | Tensor = 1.0) -> tuple:
    if not _fits(x, kernel):
        _check_conv(x, kernel)
    kernel, scale = _prepare_scale(kernel, scale)
    x = autocast_input(x)
    return x, _kernel_like(x, kernel), scale


def _prepare_add(base: Tensor, x: Tensor, kernel: Tensor, scale: float | Tensor = 1.0) -> tuple:
    if not (_fits(x, kernel, base) and base.shape == (*x.shape[:-1], kernel.shape[0] * kernel.shape[2])):
        _check_add(base, x, kernel)
    return base, *_prepare_conv(x, kernel, scale)


def _prepare_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor, scale: float | Tensor = 1.0
) -> tuple:
    if not (
        _fits(x, kernel, weight, bias)
        and weight.shape == (kernel.shape[0] * kernel.shape[2], x.shape[-1])
        and not weight.requires_grad
        and (bias is None or bias.shape == weight.shape[:1])
    ):
        _check_linear(x, weight, bias, kernel)
    x, kernel, scale = _prepare_conv(x, kernel, scale)
    return x, cast(weight, x.dtype), cast(bias, x.dtype), kernel, scale


def _prepare_weight(weight: Tensor, kernel: Tensor, scale: float | Tensor = 1.0) -> tuple:
    check_tensor("weight", weight)
    _check_kernel(kernel, weight)
    out_blocks, in_blocks, size = kernel.shape
    check_shape("weight", weight, (out_blocks * size, in_blocks * size), "(out_features, in_features) of the kernel")
    kernel, scale = _prepare_scale(kernel, scale)
    return weight, _kernel_like(weight, kernel), scale


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _conv_flops(rows: int, kernel: torch.Size) -> int:
    """Count the operations in real arithmetic: two transforms as products, and four products a complex number."""
    out_blocks, in_blocks, size = kernel
    return 2 * rows * size * size * (in_blocks + out_blocks) + 4 * rows * out_blocks * in_blocks * size


def _leading(x: torch.Size) -> int:
    return x.numel() // max(x[-1], 1)


def _gradient_flops(rows: int, kernel: torch.Size, need_x: bool, need_kernel: bool) -> int:
    return _conv_flops(rows, kernel) * (need_x + need_kernel)


def _linear_flops(
    x: torch.Size, weight: torch.Size, _bias: object, kernel: torch.Size, *_args: object, **_kw: object
) -> int:
    return 2 * x.numel() * weight[0] + _conv_flops(_leading(x), kernel)


def _backward_flops(
    grad: torch.Size, x: torch.Size, kernel: torch.Size, _scale: object, need_x: bool, need_kernel: bool, **_kw: object
) -> int:
    return _gradient_flops(_leading(x), kernel, need_x, need_kernel)


def _linear_backward_flops(
    grad: torch.Size,
    x: torch.Size,
    weight: torch.Size,
    kernel: torch.Size,
    _scale: object,
    need_x: bool,
    need_kernel: bool,
    *_args: object,
    **_kw: object,
) -> int:
    return 2 * grad.numel() * weight[1] * need_x + _gradient_flops(_leading(x), kernel, need_x, need_kernel)


def _bucket(x: Tensor, kernel: Tensor) -> tuple:
    out_blocks, in_blocks, size = kernel.shape
    return power_bucket(_rows(x), out_blocks * size, in_blocks * size, size)


def _out_shape(x: Tensor, kernel: Tensor) -> tuple:
    return (*x.shape[:-1], kernel.shape[0] * kernel.shape[2])


def _gradients(x: Tensor, kernel: Tensor, need_x: bool, need_kernel: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), kernel.new_empty(kernel.shape if need_kernel else 0)


_conv = _registry.define(
    "circulant",
    "circular_conv(Tensor x, Tensor kernel, float scale) -> Tensor",
    fake=lambda x, kernel, scale: x.new_empty(_out_shape(x, kernel)),
    flops=lambda x, kernel, *_, **__: _conv_flops(_leading(x), kernel),
    bucket=lambda x, kernel, scale: _bucket(x, kernel),
    prepare=_prepare_conv,
)

_add = _registry.define(
    "circulant",
    "circular_conv_add(Tensor base, Tensor x, Tensor kernel, float scale) -> Tensor",
    fake=lambda base, x, kernel, scale: base.new_empty(base.shape),
    flops=lambda base, x, kernel, *_, **__: _conv_flops(_leading(x), kernel),
    bucket=lambda base, x, kernel, scale: _bucket(x, kernel),
    prepare=_prepare_add,
)

_conv_backward, _add_backward = (
    _registry.define(
        "circulant",
        f"{name}_backward(Tensor grad, Tensor x, Tensor kernel, float scale, bool need_x, bool need_kernel)"
        " -> (Tensor, Tensor)",
        fake=lambda grad, x, kernel, scale, *needs: _gradients(x, kernel, *needs),
        flops=_backward_flops,
        bucket=lambda grad, x, kernel, *_: _bucket(x, kernel),
    )
    for name in ("circular_conv", "circular_conv_add")
)

_linear = _registry.define(
    "circulant",
    "circulant_linear(Tensor x, Tensor weight, Tensor? bias, Tensor kernel, float scale) -> Tensor",
    fake=lambda x, weight, bias, kernel, scale: x.new_empty(_out_shape(x, kernel)),
    flops=_linear_flops,
    bucket=lambda x, weight, bias, kernel, scale: _bucket(x, kernel),
    prepare=_prepare_linear,
)

_linear_backward = _registry.define(
    "circulant",
    "circulant_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor kernel, float scale, bool need_x,"
    " bool need_kernel, bool need_bias) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, x, weight, kernel, scale, need_x, need_kernel, need_bias: (
        *_gradients(x, kernel, need_x, need_kernel),
        grad.new_empty(weight.shape[0] if need_bias else 0),
    ),
    flops=_linear_backward_flops,
    bucket=lambda grad, x, weight, kernel, *_: _bucket(x, kernel),
)

_weight = _registry.define(
    "circulant",
    "circulant_weight(Tensor weight, Tensor kernel, float scale) -> Tensor",
    fake=lambda weight, kernel, scale: weight.new_empty(weight.shape),
    flops=lambda weight, kernel, *_, **__: 2 * weight.numel(),
    bucket=lambda weight, kernel, scale: power_bucket(*weight.shape, kernel.shape[-1]),
    prepare=_prepare_weight,
)

_weight_backward = _registry.define(
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
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        """Save x (for the kernel) and the kernel (for x)."""
        x, kernel, ctx.scale = inputs
        ctx.save_for_backward(x, kernel)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        """Run the backward operator."""
        x, kernel = ctx.saved_tensors
        need_x, need_kernel, _ = ctx.needs_input_grad
        dx, dkernel = run_backward("circular_conv", _conv_backward, grad, x, kernel, ctx.scale, need_x, need_kernel)
        return dx if need_x else None, dkernel if need_kernel else None, None


class CircularConvAdd(torch.autograd.Function):
    """Autograd for `circular_conv_add`."""

    @staticmethod
    def forward(base: Tensor, x: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """Run the operator."""
        return _add(base, x, kernel, scale)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        """Save x and the kernel."""
        _base, x, kernel, ctx.scale = inputs
        ctx.save_for_backward(x, kernel)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        """Run the backward operator; the gradient of the base output is the incoming one."""
        x, kernel = ctx.saved_tensors
        need_base, need_x, need_kernel, _ = ctx.needs_input_grad
        dx = dkernel = None
        if need_x or need_kernel:
            args = grad.to(x.dtype), x, kernel, ctx.scale, need_x, need_kernel
            dx, dkernel = run_backward("circular_conv_add", _add_backward, *args)
        return grad if need_base else None, dx if need_x else None, dkernel if need_kernel else None, None


class CirculantLinear(torch.autograd.Function):
    """Autograd for `circulant_linear`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor, scale: float) -> Tensor:
        """Run the operator."""
        return _linear(x, weight, bias, kernel, scale)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        """Save x, the kernel and a reference to the frozen weight."""
        x, weight, _bias, kernel, ctx.scale = inputs
        ctx.save_for_backward(x, weight, kernel)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        """Run the backward operator."""
        x, weight, kernel = ctx.saved_tensors
        need_x, _, need_bias, need_kernel, _ = ctx.needs_input_grad
        args = grad, x, weight, kernel, ctx.scale, need_x, need_kernel, need_bias
        dx, dkernel, dbias = run_backward("circulant_linear", _linear_backward, *args)
        return dx if need_x else None, None, dbias if need_bias else None, dkernel if need_kernel else None, None


class CirculantWeight(torch.autograd.Function):
    """Autograd for `circulant_weight`."""

    @staticmethod
    def forward(weight: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """Run the operator."""
        return _weight(weight, kernel, scale)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        """Save the kernel, for its shape and dtype."""
        _, kernel, ctx.scale = inputs
        ctx.save_for_backward(kernel)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        """Run the backward operator; the gradient of the weight is the incoming one."""
        (kernel,) = ctx.saved_tensors
        need_weight, need_kernel, _ = ctx.needs_input_grad
        dkernel = run_backward("circulant_weight", _weight_backward, grad, kernel, ctx.scale) if need_kernel else None
        return grad if need_weight else None, dkernel, None


def circular_conv(x: Tensor, kernel: Tensor, scale: float | Tensor = 1.0) -> Tensor:
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
        RuntimeError: if a named backend cannot run the call; when differentiated twice.

    Saved for backward: x and the kernel; never a spectrum.

    Source: Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv 2407.19342. The gradient in x
    that the paper's algorithm gives is not the one of its forward pass; this is.

    Example:
        >>> import peftk, torch
        >>> shift = torch.tensor([[[0.0, 1.0, 0.0]]])
        >>> peftk.functional.circular_conv(torch.tensor([1.0, 2.0, 3.0]), shift).round()
        tensor([2., 3., 1.])
    """
    return apply(CircularConv, *_prepare_conv(x, kernel, scale))


def circular_conv_add(base: Tensor, x: Tensor, kernel: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Add a circular convolution to the output of a base layer: C3A where the base layer stays a layer of its own.

    ``base + circular_conv(x, kernel, scale)``

    Args:
        base: output of the base layer, (..., out_features); it is not written to.
        x: activations, (..., in_features), float64, float32, bfloat16 or float16.
        kernel: (out_features / b, in_features / b, b), as in `circular_conv`.
        scale: a finite number, or a 0-dimensional tensor, which may require grad.

    Returns:
        (..., out_features) in the dtype of ``base``.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit.
        RuntimeError: if a named backend cannot run the call; when differentiated twice.

    Saved for backward: x and the kernel.

    Source: Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv 2407.19342.

    Example:
        >>> import peftk, torch
        >>> x, kernel = torch.ones(1, 4), torch.full((1, 2, 2), 0.5)
        >>> peftk.functional.circular_conv_add(torch.zeros(1, 2), x, kernel).round()
        tensor([[2., 2.]])
    """
    return apply(CircularConvAdd, *_prepare_add(base, x, kernel, scale))


def circulant_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor, scale: float | Tensor = 1.0
) -> Tensor:
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
        RuntimeError: if a named backend cannot run the call; when differentiated twice.

    Saved for backward: x, the kernel and a reference to the weight.

    Source: Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv 2407.19342.

    Example:
        >>> import peftk, torch
        >>> x, weight, kernel = torch.randn(5, 4), torch.randn(6, 4), torch.zeros(3, 2, 2)
        >>> torch.equal(peftk.functional.circulant_linear(x, weight, None, kernel), x @ weight.T)
        True
    """
    return apply(CirculantLinear, *_prepare_linear(x, weight, bias, kernel, scale))


def circulant_weight(weight: Tensor, kernel: Tensor, scale: float | Tensor = 1.0) -> Tensor:
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
        RuntimeError: if a named backend cannot run the call; when differentiated twice.

    Saved for backward: the kernel.

    Source: Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv 2407.19342.

    Example:
        >>> import peftk, torch
        >>> peftk.functional.circulant_weight(torch.zeros(3, 3), torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[1., 2., 3.],
                [3., 1., 2.],
                [2., 3., 1.]])
    """
    return apply(CirculantWeight, *_prepare_weight(weight, kernel, scale))
