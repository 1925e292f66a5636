"""DoRA: the norms of an adapted weight, and the output of a layer whose adapted weight is rescaled row by row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.shared.wide import wide
from ..runtime import registry
from ..runtime.timings import power_bucket
from ._autograd import run_backward
from ._checks import autocast_input, cast, check_scale, check_scale_tensor, check_shape, check_tensor, fold_zero
from ._low_rank_costs import _low_rank_flops, _rows
from .low_rank import _check_add, _fits_add, _rounded_factors, _wanted

__all__ = ["dora_compose", "dora_norm"]


def _scaled(b: Tensor, scale: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return b and a Python scale; a scale that is a tensor becomes part of b."""
    if not isinstance(scale, Tensor):
        return fold_zero(b, check_scale(scale, dtype))
    return b * check_scale_tensor(scale, b), 1.0


def _prepare_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor = 1.0) -> tuple[Any, ...]:
    check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (out_features, in_features); got {tuple(weight.shape)}")
    check_tensor("a", a, like=weight)
    check_tensor("b", b, like=weight)
    if a.dim() != 2 or a.shape[0] == 0:
        raise ValueError(f"a: expected shape (rank, in_features) with rank >= 1; got {tuple(a.shape)}")
    check_shape("a", a, (None, weight.shape[1]), "(rank, in_features)")
    check_shape("b", b, (weight.shape[0], a.shape[0]), "(out_features, rank)")
    b, scale = _scaled(b, scale, weight.dtype)
    dtype = wide(weight.dtype)
    return weight.detach(), cast(a.detach(), dtype), cast(b.detach(), dtype), scale


def _prepare_compose(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gain: Tensor,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> tuple[Any, ...]:
    if not _fits_add(base, x, a, b):
        _check_add(base, x, a, b)
    for name, value in [("gain", gain)] if bias is None else [("gain", gain), ("bias", bias)]:
        check_tensor(name, value, like=x)
        check_shape(name, value, (b.shape[0],), "(out_features,)")
    b, scale = _scaled(b, scale, x.dtype)
    x = autocast_input(x)
    # The gain, whose gradient is a long sum, stays exact.
    return base, x, a, b, cast(gain, wide(base.dtype)), bias, scale


_SMALL = {torch.float32: 2.0**-50, torch.float64: 2.0**-480}
"""Norms below these may lack squares that were too small to be kept: they weigh nothing beside larger norms."""

_PIECE = 1 << 20
"""Elements of the adapted weight that are made at a time."""


def _rescued(norms: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Find again, without their squares, the norms whose squares are too small or too large for the dtype.

    On the CPU alone: on a GPU every call would have to wait for the answer whether there is one.
    """
    if not norms.is_cpu or not norms.numel():
        return norms
    least, most = (float(end) for end in norms.aminmax())
    if least > _SMALL[norms.dtype] and most < math.inf:
        return norms
    doubtful = torch.nonzero(~((norms > _SMALL[norms.dtype]) & norms.isfinite())).flatten()
    norms, wide_a = norms.clone(), a.double()
    for rows in doubtful.split(max(1, _PIECE // max(weight.shape[1], 1))):
        adapted = torch.addmm(weight[rows].double(), b[rows].double(), wide_a, alpha=scale)
        largest = torch.linalg.vector_norm(adapted, math.inf, dim=1, keepdim=True)
        # Of zeros, and of what is not finite, the largest is the norm.
        plain = (largest == 0) | ~largest.isfinite()
        found = torch.linalg.vector_norm(adapted / largest.masked_fill(plain, 1.0), dim=1, keepdim=True) * largest
        norms[rows] = torch.where(plain, largest, found).flatten().to(norms.dtype)
    return norms


_norm = registry.define(
    "dora",
    "dora_norm(Tensor weight, Tensor a, Tensor b, float scale) -> Tensor",
    fake=lambda weight, a, b, scale: b.new_empty(weight.shape[0]),
    flops=lambda weight, a, b, *_args, **_kwargs: 2 * weight.numel() * (a[0] + 1),
    bucket=lambda weight, a, b, scale: power_bucket(*weight.shape, a.shape[0]),
    prepare=_prepare_norm,
    finish=_rescued,
)

_ARGUMENTS = "Tensor a, Tensor b, Tensor gain, Tensor? bias, float scale"

_compose = registry.define(
    "dora",
    f"dora_compose(Tensor base, Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=lambda base, x, a, *_: (base.new_empty(base.shape), x.new_empty(*x.shape[:-1], a.shape[0])),
    flops=lambda base, x, a, b, *_args, **_kwargs: 3 * base.numel() + _low_rank_flops(x, a, b),
    bucket=lambda base, x, a, b, *_: power_bucket(_rows(x), b.shape[0], *reversed(a.shape)),
    prepare=lambda *args, **kwargs: _rounded_factors(_prepare_compose(*args, **kwargs), 2),
)


def _gradients(
    grad: Tensor,
    base: Tensor,
    x: Tensor,
    hidden: Tensor,
    a: Tensor,
    b: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    scale: float,
    *needs: bool,
) -> tuple[Tensor, ...]:
    like = grad, x, a, b, gain, grad if bias is None else bias
    dtypes = grad.dtype, x.dtype, wide(a.dtype), wide(b.dtype), gain.dtype, like[-1].dtype
    found = zip(like, needs, dtypes, strict=True)
    return tuple(t.new_empty(t.shape if need else 0, dtype=dtype) for t, need, dtype in found)


_compose_backward = registry.define(
    "dora",
    f"dora_compose_backward(Tensor grad, Tensor base, Tensor x, Tensor hidden, {_ARGUMENTS},"
    " bool need_base, bool need_x, bool need_a, bool need_b, bool need_gain, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_gradients,
    flops=lambda grad, base, x, hidden, a, b, *_args, **_kwargs: 4 * grad.numel() + 2 * _low_rank_flops(x, a, b),
    bucket=lambda grad, base, x, hidden, a, b, *_: power_bucket(_rows(x), b.shape[0], *reversed(a.shape)),
)


def _plain(grad: Tensor, base: Tensor, x: Tensor, _hidden: Tensor, a: Tensor, *others: Any) -> Any:
    return _compose_backward(grad, base, x, linear(x, a), a, *others)


class DoraCompose(torch.autograd.Function):
    """Autograd for `dora_compose`."""

    @staticmethod
    def forward(
        base: Tensor, x: Tensor, a: Tensor, b: Tensor, gain: Tensor, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Run the operator. The factors are rounded here, so that no gradient of them passes through a rounding."""
        return _compose(*_rounded_factors((base, x, a, b, gain, bias, scale), 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the base output for the gradient of the gain, x and the rank-sized product."""
        base, x, a, b, gain, bias, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(base, x, output[1], a, b, gain, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        """Run the backward operator."""
        if grad is None:
            return (None,) * 7
        needs = ctx.needs_input_grad[:6]
        base, x, hidden, a, b, gain, bias = ctx.saved_tensors
        args = grad, base, x, hidden, a.to(x.dtype), b.to(x.dtype), gain, bias, ctx.scale
        found = run_backward(_compose_backward, *args, *needs, plain=_plain)
        return (*_wanted(found, needs), None)


def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return the norms of the rows of a weight with a low-rank update, without that matrix: DoRA's denominators.

    ``||weight[i] + scale * (b @ a)[i]||``. Whatever a is, a row whose b is zero has the same bits: ``||weight[i]||``.

    DoRA takes the norm for a constant: no gradient flows to any argument, whether it requires one or not.

    Args:
        weight: (out_features, in_features), float64, float32, bfloat16 or float16; its transpose may be contiguous.
            There is no float32 copy of a half-precision weight.
        a: (rank, in_features), any floating dtype.
        b: (out_features, rank).
        scale: a finite number, or a 0-dimensional tensor.

    Returns:
        (out_features,) in float32, or float64 if ``weight`` is.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: nothing.

    Source: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353, section 4.3.

    Example:
        >>> import peftk, torch
        >>> peftk.functional.dora_norm(torch.zeros(2, 2), torch.eye(2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])
    """
    return _norm(*_prepare_norm(weight, a, b, scale))


def dora_compose(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gain: Tensor,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Rescale a base layer's output together with its low-rank update, about the bias: the output of DoRA.

    ``bias + gain * (base - bias + scale * (x @ a.T) @ b.T)``, computed as
    ``gain * base + (1 - gain) * bias + gain * scale * (x @ a.T) @ b.T`` in one pass over the output, so that it is the
    base output where the gain is one and b is zero.

    Args:
        base: output of the base layer, (..., out_features), bias included; it is not written to.
        x: activations, (..., in_features), float64, float32, bfloat16 or float16.
        a: (rank, in_features), any floating dtype; rounded to the dtype of x, as is b.
        b: (out_features, rank).
        gain: (out_features,), any floating dtype; computed in float32 at least. For DoRA, the magnitude divided by
            `dora_norm`.
        bias: (out_features,) or None; the part of ``base`` that is not scaled.
        scale: a finite number, or a 0-dimensional tensor, which may require grad.

    Returns:
        (..., out_features) in the dtype of ``base``.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: base, x, the (..., rank) product, the factors, the gain and the bias.

    Source: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353.

    Example:
        >>> import peftk, torch
        >>> x, a, b = torch.ones(1, 3), torch.ones(1, 3), torch.ones(2, 1)
        >>> gain, bias = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])
        >>> peftk.functional.dora_compose(torch.ones(1, 2), x, a, b, gain, bias)
        tensor([[7., 4.]])
    """
    return registry.apply(DoraCompose, *_prepare_compose(base, x, a, b, gain, bias, scale))[0]
