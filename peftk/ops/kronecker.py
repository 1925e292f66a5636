"""The Kronecker product of LoKr: two small contractions of the activations, or a write of the changed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.shared.wide import wide
from ..runtime import registry
from ..runtime.timings import power_bucket
from ._autograd import run_backward
from ._checks import autocast_input, cast, check_frozen, check_scale, check_shape, check_tensor
from ._few_rows import ORDINARY, module_of, rows_of_one_pass, usual
from .plain import ordinary

DIRECT_ROWS = 16
"""Rows up to which the update is multiplied by without an operator; measured with AVX-512 and AMX."""

__all__ = ["kronecker_add", "kronecker_linear", "kronecker_weight"]


def _check_factors(w1: Tensor, w2: Tensor, features: int, out: int, like: Tensor) -> None:
    for name, factor in (("w1", w1), ("w2", w2)):
        check_tensor(name, factor, like=like)
        if factor.dim() != 2 or 0 in factor.shape:
            raise ValueError(f"{name}: expected 2 dimensions, none of them empty; got {tuple(factor.shape)}")
    (left, middle), (rows, columns) = w1.shape, w2.shape
    if middle * columns != features or left * rows != out:
        raise ValueError(
            f"w1, w2: expected shapes (l, m) and (k, n) with m * n = in_features = {features} and "
            f"l * k = out_features = {out}; got {tuple(w1.shape)} and {tuple(w2.shape)}, "
            f"which are {middle * columns} and {left * rows}"
        )


def _check_x(x: Tensor) -> None:
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least 1 dimension (..., in_features); got a 0-dimensional tensor")


def _check_add(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> None:
    _check_x(x)
    check_tensor("base", base, like=x)
    check_shape("base", base, (*x.shape[:-1], base.shape[-1] if base.dim() else 0), "(..., out_features)")
    _check_factors(w1, w2, x.shape[-1], base.shape[-1], x)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor) -> None:
    _check_x(x)
    check_tensor("weight", weight, like=x)
    check_frozen("weight", weight)
    check_shape("weight", weight, (None, x.shape[-1]), "(out_features, in_features)")
    _check_factors(w1, w2, x.shape[-1], weight.shape[0], x)
    if bias is not None:
        check_tensor("bias", bias, like=x)
        check_shape("bias", bias, (weight.shape[0],), "(out_features,)")


def _check_weight(weight: Tensor, w1: Tensor, w2: Tensor) -> None:
    check_tensor("weight", weight)
    check_shape("weight", weight, (None, None), "(out_features, in_features)")
    _check_factors(w1, w2, weight.shape[1], weight.shape[0], weight)


def _match(features: int, out: int, w1: Tensor, w2: Tensor) -> bool:
    (left, middle), (rows, columns) = w1.shape, w2.shape
    return middle * columns == features > 0 and left * rows == out > 0


def _fits_add(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> bool:
    """Say cheaply whether the arguments are right; `_check_add` finds out what is wrong."""
    try:
        return (
            base.shape[:-1] == x.shape[:-1]
            and _match(x.shape[-1], base.shape[-1], w1, w2)
            and ordinary(x, base, w1, w2)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _fits_linear(x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor) -> bool:
    """Say cheaply whether the arguments are right; `_check_linear` finds out what is wrong."""
    try:
        out, features = weight.shape
        return (
            x.shape[-1] == features
            and _match(features, out, w1, w2)
            and not weight.requires_grad
            and (bias is None or bias.shape == (out,))
            and ordinary(x, weight, bias, w1, w2)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _wide(factor: Tensor, dtype: torch.dtype) -> Tensor:
    # A factor that no large product reads stays exact: its gradient is a long sum.
    return cast(factor, torch.float64 if dtype is torch.float64 else torch.float32)


def _prepare_add(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float = 1.0) -> tuple[Any, ...]:
    if not _fits_add(base, x, w1, w2):
        _check_add(base, x, w1, w2)
    scale, x = check_scale(scale, x.dtype), autocast_input(x)
    return base, x, _wide(w1, x.dtype), w2, scale


def _prepare_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: float = 1.0
) -> tuple[Any, ...]:
    if not _fits_linear(x, weight, bias, w1, w2):
        _check_linear(x, weight, bias, w1, w2)
    scale, x = check_scale(scale, x.dtype), autocast_input(x)
    dtype = x.dtype
    return x, cast(weight, dtype), cast(bias, dtype), _wide(w1, dtype), w2, scale


def _rounded_factor(args: tuple[Any, ...], at: int) -> tuple[Any, ...]:
    """Return the arguments of an operator, w2, which stands at this place, in the dtype of x."""
    dtype = args[1 if at == 3 else 0].dtype
    return args if args[at].dtype is dtype else (*args[:at], args[at].to(dtype), *args[at + 1 :])


def _prepare_weight(weight: Tensor, w1: Tensor, w2: Tensor, scale: float = 1.0) -> tuple[Any, ...]:
    _check_weight(weight, w1, w2)
    return weight, _wide(w1, weight.dtype), _wide(w2, weight.dtype), check_scale(scale, weight.dtype)


def _products(x: torch.Size, w1: torch.Size, w2: torch.Size) -> int:
    """Count the operations of one application, in the cheaper order of the two contractions."""
    (left, middle), (rows, columns) = w1, w2
    tokens = x.numel() // max(x[-1], 1)
    return 2 * tokens * min(middle * rows * (columns + left), left * columns * (middle + rows))


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _bucket(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[int, ...]:
    return power_bucket(_rows(x), *w1.shape, *w2.shape)


def _gradients(x: Tensor, w1: Tensor, w2: Tensor, need_x: bool, need_w1: bool, need_w2: bool) -> tuple[Any, ...]:
    return (
        x.new_empty(x.shape if need_x else 0),
        w1.new_empty(w1.shape if need_w1 else 0),
        w2.new_empty(w2.shape if need_w2 else 0, dtype=wide(w2.dtype)),
    )


_FACTORS = "Tensor w1, Tensor w2, float scale"
_NEEDS = "bool need_x, bool need_w1, bool need_w2"

_add = registry.define(
    "kronecker",
    f"kronecker_add(Tensor base, Tensor x, {_FACTORS}) -> Tensor",
    fake=lambda base, x, *_: base.new_empty(base.shape),
    flops=lambda base, x, w1, w2, *_, **__: _products(x, w1, w2),
    bucket=lambda base, x, w1, w2, *_: _bucket(x, w1, w2),
    prepare=lambda *args, **kwargs: _rounded_factor(_prepare_add(*args, **kwargs), 3),
)

_add_backward = registry.define(
    "kronecker",
    f"kronecker_add_backward(Tensor grad, Tensor x, {_FACTORS}, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, x, w1, w2, scale, *needs: _gradients(x, w1, w2, *needs),
    flops=lambda grad, x, w1, w2, *_, **__: 3 * _products(x, w1, w2),
    bucket=lambda grad, x, w1, w2, *_: _bucket(x, w1, w2),
)

_linear = registry.define(
    "kronecker",
    f"kronecker_linear(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}) -> Tensor",
    fake=lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    flops=lambda x, weight, bias, w1, w2, *_, **__: 2 * x.numel() * weight[0] + _products(x, w1, w2),
    bucket=lambda x, weight, bias, w1, w2, *_: _bucket(x, w1, w2),
    prepare=lambda *args, **kwargs: _rounded_factor(_prepare_linear(*args, **kwargs), 4),
)

_linear_backward = registry.define(
    "kronecker",
    f"kronecker_linear_backward(Tensor grad, Tensor x, Tensor weight, {_FACTORS}, {_NEEDS}, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda grad, x, weight, w1, w2, scale, need_x, need_w1, need_w2, need_bias: (
        *_gradients(x, w1, w2, need_x, need_w1, need_w2),
        grad.new_empty(weight.shape[0] if need_bias else 0),
    ),
    flops=lambda grad, x, weight, w1, w2, *_, **__: 2 * x.numel() * weight[0] + 3 * _products(x, w1, w2),
    bucket=lambda grad, x, weight, w1, w2, *_: _bucket(x, w1, w2),
)

_weight = registry.define(
    "kronecker",
    f"kronecker_weight(Tensor weight, {_FACTORS}) -> Tensor",
    fake=lambda weight, *_: weight.new_empty(weight.shape),
    flops=lambda weight, *_, **__: 2 * weight.numel(),
    bucket=lambda weight, w1, w2, *_: power_bucket(*w1.shape, *w2.shape),
    prepare=_prepare_weight,
)

_weight_backward = registry.define(
    "kronecker",
    f"kronecker_weight_backward(Tensor grad, {_FACTORS}, bool need_w1, bool need_w2) -> (Tensor, Tensor)",
    fake=lambda grad, w1, w2, scale, *needs: _gradients(grad, w1, w2, False, *needs)[1:],
    flops=lambda grad, *_, **__: 4 * grad.numel(),
    bucket=lambda grad, w1, w2, *_: power_bucket(*w1.shape, *w2.shape),
    on_gpus=registry.TRITON_FIRST,
)


def _wanted(gradients: tuple[Any, ...], needs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


class KroneckerAdd(torch.autograd.Function):
    """Autograd for `kronecker_add`."""

    @staticmethod
    def forward(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
        """Run the operator. w2 is rounded here, so that no gradient of it passes through a rounding."""
        return _add(*_rounded_factor((base, x, w1, w2, scale), 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x and the factors."""
        _base, x, w1, w2, ctx.scale = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w1, w2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        """Run the backward operator; the gradient of the base output is the incoming one."""
        if grad is None:
            return (None,) * 5
        x, w1, w2 = ctx.saved_tensors
        need_base, *needs = ctx.needs_input_grad[:4]
        args = grad.to(x.dtype), x, w1, w2.to(x.dtype), ctx.scale, *needs
        gradients = run_backward(_add_backward, *args) if any(needs) else (None,) * 3
        return (grad if need_base else None, *_wanted(gradients, needs), None)


class KroneckerLinear(torch.autograd.Function):
    """Autograd for `kronecker_linear`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
        """Run the operator. w2 is rounded here, so that no gradient of it passes through a rounding."""
        return _linear(*_rounded_factor((x, weight, bias, w1, w2, scale), 4))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x, the factors and a reference to the frozen weight."""
        x, weight, _bias, w1, w2, ctx.scale = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, w1, w2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        """Run the backward operator."""
        if grad is None:
            return (None,) * 6
        x, weight, w1, w2 = ctx.saved_tensors
        need_x, _, need_bias, *needs = ctx.needs_input_grad[:5]
        needs = need_x, *needs, need_bias
        args = grad, x, weight, w1, w2.to(x.dtype), ctx.scale, *needs
        dx, dw1, dw2, dbias = _wanted(run_backward(_linear_backward, *args), needs)
        return dx, None, dbias, dw1, dw2, None


class KroneckerWeight(torch.autograd.Function):
    """Autograd for `kronecker_weight`."""

    @staticmethod
    def forward(weight: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
        """Run the operator."""
        return _weight(weight, w1, w2, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the factors."""
        _weight, w1, w2, ctx.scale = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w1, w2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        """Run the backward operator; the gradient of the weight is the incoming one."""
        if grad is None:
            return (None,) * 4
        need_weight, *needs = ctx.needs_input_grad[:3]
        args = grad, *ctx.saved_tensors, ctx.scale, *needs
        gradients = run_backward(_weight_backward, *args) if any(needs) else (None,) * 2
        return (grad if need_weight else None, *_wanted(gradients, needs), None)


def kronecker_add(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
    """Add a product with a Kronecker product to the output of a base layer: LoKr beside a layer of its own.

    ``base + scale * x @ kron(w1, w2).T``, computed as two contractions of x seen as (..., m, n):
    ``y[l, k] = sum w1[l, m] w2[k, n] x[m, n]``. The dense product is never built.

    Args:
        base: output of the base layer, (..., l * k); it is not written to.
        x: activations, (..., m * n), float64, float32, bfloat16 or float16.
        w1: (l, m), any floating dtype; used in float32 (float64 for float64 activations).
        w2: (k, n), any floating dtype; rounded to the dtype of x.
        scale: a finite number.

    Returns:
        (..., l * k) in the dtype of ``base``.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x and the factors.

    Source: Edalati et al., KronA, arXiv 2212.10650; Yeh et al., LyCORIS, arXiv 2309.14859.

    Example:
        >>> import peftk, torch
        >>> x, w1, w2 = torch.arange(4.0)[None], torch.tensor([[1.0, -1.0]]), torch.ones(3, 2)
        >>> peftk.functional.kronecker_add(torch.zeros(1, 3), x, w1, w2, scale=0.5)
        tensor([[-2., -2., -2.]])
    """
    return registry.apply(KroneckerAdd, *_prepare_add(base, x, w1, w2, scale))


def kronecker_few(
    x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: float
) -> Tensor | None:
    """Return `kronecker_linear` of few rows, `unobserved`, or None where the operator has to run."""
    module = module_of("kronecker")
    if module is None or not x.is_cpu or type(x) not in ORDINARY:
        return None
    y: Tensor | None = module.few(x, weight, bias, w1, w2, scale, rows_of_one_pass(x.dtype))
    if y is not None:
        return y
    # Beyond, the library's own product is the faster one.
    if x.numel() > DIRECT_ROWS * x.shape[-1] or not usual(x, w1, w2):
        return None
    (left, middle), (rows, columns) = w1.shape, w2.shape
    if middle * columns != x.shape[-1] or left * rows != weight.shape[0]:
        return None
    added = x.new_empty(*x.shape[:-1], left * rows, dtype=torch.float32)
    module.rows(x, w1, w2, scale, added)
    return linear(x, weight, bias).add_(added)


def kronecker_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: float = 1.0
) -> Tensor:
    """Apply a frozen linear layer and its LoKr adapter in one operator.

    ``linear(x, weight, bias) + scale * x @ kron(w1, w2).T``; the products accumulate in one buffer, forward and
    backward, and the dense Kronecker product is never built.

    Args:
        x: activations, (..., m * n), float64, float32, bfloat16 or float16.
        weight: frozen weight, (l * k, m * n).
        bias: (l * k,) or None; may require grad.
        w1: see `kronecker_add`; so are w2 and scale.
        w2: see `kronecker_add`.
        scale: see `kronecker_add`.

    Returns:
        (..., l * k) in the dtype of x (its autocast dtype under autocast).

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit, or if the weight requires grad.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x, the factors and a reference to the weight.

    Source: Edalati et al., KronA, arXiv 2212.10650; Yeh et al., LyCORIS, arXiv 2309.14859.

    Example:
        >>> import peftk, torch
        >>> x, weight, w1, w2 = torch.randn(5, 6), torch.randn(4, 6), torch.zeros(2, 3), torch.randn(2, 2)
        >>> torch.equal(peftk.functional.kronecker_linear(x, weight, None, w1, w2), x @ weight.T)
        True
    """
    return registry.apply(KroneckerLinear, *_prepare_linear(x, weight, bias, w1, w2, scale))


def kronecker_weight(weight: Tensor, w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
    """Write a weight with a Kronecker product added: what merging does, and weight-side layers.

    ``weight + scale * kron(w1, w2)``, element by element as the result is written, and rounded once. A convolution
    passes its weight as (out, in * kh * kw) and w2 as (k, n * kh * kw).

    Args:
        weight: (l * k, m * n), float64, float32, bfloat16 or float16; it is not written to.
        w1: (l, m), any floating dtype; used in float32 (float64 for a float64 weight), as is w2.
        w2: (k, n).
        scale: a finite number.

    Returns:
        (l * k, m * n) in the dtype of ``weight``.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: the factors.

    Source: Edalati et al., KronA, arXiv 2212.10650; Yeh et al., LyCORIS, arXiv 2309.14859.

    Example:
        >>> import peftk, torch
        >>> weight, w1, w2 = torch.zeros(2, 4), torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> peftk.functional.kronecker_weight(weight, w1, w2)
        tensor([[1., 0., 2., 0.],
                [0., 1., 0., 2.]])
    """
    return registry.apply(KroneckerWeight, *_prepare_weight(weight, w1, w2, scale))
