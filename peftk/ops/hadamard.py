"""LoHa's Hadamard product of two low-rank matrices: as one low-rank product, or written into a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime import registry
from ..runtime.timings import power_bucket
from ._autograd import run_backward
from ._checks import check_scale, check_scale_tensor, check_tensor
from .plain import DENSE, ordinary

__all__ = ["hadamard_weight", "khatri_rao"]


def _check_factors(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> None:
    check_tensor("w1_a", w1_a)
    for name, value in (("w1_b", w1_b), ("w2_a", w2_a), ("w2_b", w2_b)):
        check_tensor(name, value, like=w1_a)
    for pair, left, right in (("w1", w1_a, w1_b), ("w2", w2_a, w2_b)):
        if left.dim() != 2 or left.shape[1] == 0:
            raise ValueError(f"{pair}_a: expected shape (out, rank) with rank >= 1; got {tuple(left.shape)}")
        if right.dim() != 2 or right.shape[0] != left.shape[1]:
            raise ValueError(
                f"{pair}_b: expected shape (rank, in) = ({left.shape[1]}, any), the rank being that of {pair}_a; "
                f"got {tuple(right.shape)}"
            )
    if w2_a.shape[0] != w1_a.shape[0]:
        raise ValueError(f"w2_a: expected {w1_a.shape[0]} rows, as w1_a has; got {w2_a.shape[0]}")
    if w2_b.shape[1] != w1_b.shape[1]:
        raise ValueError(f"w2_b: expected {w1_b.shape[1]} columns, as w1_b has; got {w2_b.shape[1]}")


def _fits_factors(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> bool:
    """Say cheaply whether the factors are right; `_check_factors` finds out what is wrong."""
    try:
        (out, r1), (r1_, features), (out_, r2), (r2_, features_) = w1_a.shape, w1_b.shape, w2_a.shape, w2_b.shape
        return (
            r1 == r1_ > 0
            and r2 == r2_ > 0
            and out == out_
            and features == features_
            and ordinary(w1_a, w1_b, w2_a, w2_b)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _one_dtype(*factors: Tensor) -> tuple[Tensor, ...]:
    """Cast the factors to one dtype: that of the widest."""
    first = factors[0].dtype
    if all(f.dtype is first for f in factors):
        return factors
    for f in factors:
        first = torch.promote_types(first, f.dtype)
    return tuple(f.to(first) for f in factors)


def _prepare_khatri_rao(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, *, dtype: torch.dtype | None = None
) -> tuple[Any, ...]:
    if not _fits_factors(w1_a, w1_b, w2_a, w2_b):
        _check_factors(w1_a, w1_b, w2_a, w2_b)
    if dtype is not None and dtype not in DENSE:
        raise TypeError(f"dtype: expected None, float64, float32, bfloat16 or float16; got {dtype!r}")
    factors = _one_dtype(w1_a, w1_b, w2_a, w2_b)
    return (*factors, factors[0].dtype if dtype is None else dtype)


def _prepare_weight(
    weight: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float | Tensor = 1.0
) -> tuple[Any, ...]:
    if not _fits_factors(w1_a, w1_b, w2_a, w2_b):
        _check_factors(w1_a, w1_b, w2_a, w2_b)
    check_tensor("weight", weight, like=w1_a)
    out, features = w1_a.shape[0], w1_b.shape[1]
    if weight.dim() < 2 or weight.shape[0] != out or weight.shape[1:].numel() != features:
        raise ValueError(
            f"weight: expected shape (out, ...) with {features} elements in each of {out} rows, as the factors say; "
            f"got {tuple(weight.shape)}"
        )
    factors = _one_dtype(w1_a, w1_b, w2_a, w2_b)
    if isinstance(scale, Tensor):
        scale = check_scale_tensor(scale, factors[0])
        factors = ((factors[0] * scale).to(factors[0].dtype), *factors[1:])
        scale = 1.0
    if weight.dtype is torch.float64 or factors[0].dtype is torch.float64:
        factors = tuple(f.double() for f in factors)
    return (weight, *factors, check_scale(scale, factors[0].dtype))


def _products(w1_a: torch.Size, w1_b: torch.Size, w2_a: torch.Size) -> int:
    return w1_a[1] * w2_a[1] * (w1_a[0] + w1_b[1])


def _weight_flops(w1_a: torch.Size, w1_b: torch.Size, w2_a: torch.Size) -> int:
    return 2 * w1_a[0] * w1_b[1] * (w1_a[1] + w2_a[1] + 1)


def _bucket(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, *_: object) -> tuple[Any, ...]:
    return power_bucket(w1_a.shape[0], w1_b.shape[1], w1_a.shape[1], w2_a.shape[1])


def _fake_factors(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, dtype: torch.dtype | None) -> tuple[Any, ...]:
    rank = w1_a.shape[1] * w2_a.shape[1]
    dtype = w1_a.dtype if dtype is None else dtype
    return w1_a.new_empty(rank, w1_b.shape[1], dtype=dtype), w1_a.new_empty(w1_a.shape[0], rank, dtype=dtype)


def _gradients(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, needs: tuple[Any, ...]) -> tuple[Any, ...]:
    factors = (w1_a, w1_b, w2_a, w2_b)
    return tuple(f.new_empty(f.shape if need else 0) for f, need in zip(factors, needs, strict=True))


_FACTORS = "Tensor w1_a, Tensor w1_b, Tensor w2_a, Tensor w2_b"
_NEEDS = "bool need_w1_a, bool need_w1_b, bool need_w2_a, bool need_w2_b"
_RESULTS = "(Tensor, Tensor, Tensor, Tensor)"

_khatri_rao = registry.define(
    "hadamard",
    f"khatri_rao({_FACTORS}, ScalarType? dtype) -> (Tensor, Tensor)",
    fake=_fake_factors,
    flops=lambda w1_a, w1_b, w2_a, *_, **__: _products(w1_a, w1_b, w2_a),
    bucket=_bucket,
    prepare=_prepare_khatri_rao,
)

_khatri_rao_backward = registry.define(
    "hadamard",
    f"khatri_rao_backward(Tensor grad_a, Tensor grad_b, {_FACTORS}, {_NEEDS}) -> {_RESULTS}",
    fake=lambda grad_a, grad_b, w1_a, w1_b, w2_a, w2_b, *needs: _gradients(w1_a, w1_b, w2_a, w2_b, needs),
    flops=lambda grad_a, grad_b, w1_a, w1_b, w2_a, *_, **__: 4 * _products(w1_a, w1_b, w2_a),
    bucket=lambda grad_a, grad_b, *args: _bucket(*args),
)

_weight = registry.define(
    "hadamard",
    f"hadamard_weight(Tensor weight, {_FACTORS}, float scale) -> Tensor",
    fake=lambda weight, *_: weight.new_empty(weight.shape),
    flops=lambda weight, w1_a, w1_b, w2_a, *_, **__: _weight_flops(w1_a, w1_b, w2_a),
    bucket=lambda weight, *args: _bucket(*args),
    on_gpus=registry.TRITON_FIRST,
    prepare=_prepare_weight,
)

_weight_backward = registry.define(
    "hadamard",
    f"hadamard_weight_backward(Tensor grad, {_FACTORS}, float scale, {_NEEDS}) -> {_RESULTS}",
    fake=lambda grad, w1_a, w1_b, w2_a, w2_b, scale, *needs: _gradients(w1_a, w1_b, w2_a, w2_b, needs),
    flops=lambda grad, w1_a, w1_b, w2_a, *_, **__: 3 * _weight_flops(w1_a, w1_b, w2_a),
    bucket=lambda grad, *args: _bucket(*args),
)


def _wanted(gradients: tuple[Any, ...], needs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


class KhatriRao(torch.autograd.Function):
    """Autograd for `khatri_rao`."""

    @staticmethod
    def forward(
        w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Run the operator."""
        return _khatri_rao(w1_a, w1_b, w2_a, w2_b, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the four factors."""
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor, grad_b: Tensor) -> tuple[Any, ...]:
        """Run the backward operator."""
        needs = ctx.needs_input_grad[:4]
        found = run_backward(_khatri_rao_backward, grad_a, grad_b, *ctx.saved_tensors, *needs)
        return *_wanted(found, needs), None


class HadamardWeight(torch.autograd.Function):
    """Autograd for `hadamard_weight`."""

    @staticmethod
    def forward(weight: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float) -> Tensor:
        """Run the operator."""
        return _weight(weight, w1_a, w1_b, w2_a, w2_b, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the four factors."""
        _weight, *factors, ctx.scale = inputs
        ctx.save_for_backward(*factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Run the backward operator; the gradient of the weight is the incoming one."""
        need_weight, *needs = ctx.needs_input_grad[:5]
        args = grad, *ctx.saved_tensors, ctx.scale, *needs
        found = run_backward(_weight_backward, *args) if any(needs) else (None,) * 4
        return grad if need_weight else None, *_wanted(found, needs), None


def khatri_rao(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Turn the Hadamard product of two low-rank matrices into one low-rank product.

    ``(w1_a @ w1_b) * (w2_a @ w2_b) == b @ a`` with ``a[i * r2 + j] = w1_b[i] * w2_b[j]`` and
    ``b[:, i * r2 + j] = w1_a[:, i] * w2_a[:, j]``, so that LoHa of rank r is `low_rank_linear` of rank r * r.

    Args:
        w1_a: (out, r1), any floating dtype; the products are computed in float32 (float64 of float64).
        w1_b: (r1, in).
        w2_a: (out, r2).
        w2_b: (r2, in).
        dtype: of the results; that of the factors if None.

    Returns:
        a, (r1 * r2, in), and b, (out, r1 * r2).

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes or devices do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: the four factors.

    Source: Hyeon-Woo et al., FedPara: Low-rank Hadamard Product for Communication-Efficient Federated Learning,
    arXiv 2108.06098.

    Example:
        >>> import peftk, torch
        >>> w = [torch.randn(4, 2), torch.randn(2, 3), torch.randn(4, 2), torch.randn(2, 3)]
        >>> a, b = peftk.functional.khatri_rao(*w)
        >>> torch.allclose(b @ a, (w[0] @ w[1]) * (w[2] @ w[3]), atol=1e-5)
        True
    """
    return registry.apply(KhatriRao, *_prepare_khatri_rao(w1_a, w1_b, w2_a, w2_b, dtype=dtype))


def hadamard_weight(
    weight: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float | Tensor = 1.0
) -> Tensor:
    """Add the Hadamard product of two low-rank matrices to a weight, tile by tile.

    ``weight + scale * (w1_a @ w1_b) * (w2_a @ w2_b)``. Where the product is zero, every bit of the weight stays.

    Args:
        weight: (out, ...) with ``in`` elements in each row, float64, float32, bfloat16 or float16; not written to.
        w1_a: (out, r1), any floating dtype.
        w1_b: (r1, in).
        w2_a: (out, r2).
        w2_b: (r2, in).
        scale: a finite number, or a 0-dimensional tensor, which may require grad.

    Returns:
        A tensor like ``weight``; sums are float32 (float64 where an argument is) and are rounded once.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: the four factors. The backward operator contracts the incoming gradient to them by tiles too.

    Source: Hyeon-Woo et al., FedPara: Low-rank Hadamard Product for Communication-Efficient Federated Learning,
    arXiv 2108.06098.

    Example:
        >>> import peftk, torch
        >>> ones = torch.ones(2, 1), torch.ones(1, 3)
        >>> peftk.functional.hadamard_weight(torch.zeros(2, 3), *ones, *ones, scale=0.5)
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """
    return registry.apply(HadamardWeight, *_prepare_weight(weight, w1_a, w1_b, w2_a, w2_b, scale))
