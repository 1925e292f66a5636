"""A frozen linear layer with LoHa's factors: composed of operators, so that backward derives again what forward did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..runtime import registry
from ._autograd import run_backward, transformed
from ._few_rows import FEW, ORDINARY, module_of, pays_in_one_pass, usual
from ._wide_product import wide_product
from .hadamard import _khatri_rao, _khatri_rao_backward, _weight, _weight_backward, hadamard_weight, khatri_rao
from .low_rank import _linear, _linear_backward, low_rank_add, low_rank_linear

Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def low_rank_pays(tokens: int, out: int, features: int, r1: int, r2: int) -> bool:
    """Say whether three products of rank r1 * r2 cost less than writing the weight twice and one dense gradient.

    Counted in operations: forward, the gradient in x and those in the factors, against one more product with the
    incoming gradient and the tiles of both factor pairs.
    """
    return 6 * tokens * r1 * r2 * (out + features) <= out * features * (2 * tokens + 10 * (r1 + r2))


class _LowRank(torch.autograd.Function):
    """The low-rank product of rank r1 * r2, whose factors are computed again for the backward pass."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        w1_a: Tensor,
        w1_b: Tensor,
        w2_a: Tensor,
        w2_b: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        a, b = _khatri_rao(w1_a, w1_b, w2_a, w2_b, x.dtype)
        return _linear(x, weight, bias, a, b, None, scale, 0.0, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _bias, *factors, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1], weight, *factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 8
        needs = ctx.needs_input_grad
        dx, dbias, *found = run_backward(
            _low_rank_gradients, needs, ctx.scale, grad, *ctx.saved_tensors, plain=_plain_gradients
        )
        return dx, None, dbias, *found, None


def _low_rank_gradients(
    needs: Sequence[bool], scale: float, grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, *factors: Tensor
) -> tuple[Any, ...]:
    need_x, _, need_bias, *four = needs[:7]
    need_a, need_b = four[1] or four[3], four[0] or four[2]
    a, b = _khatri_rao(*factors, x.dtype)
    wanted = need_x, need_a, need_b, False, need_bias
    dx, da, db, _, dbias = _linear_backward(grad, x, hidden, weight, a, b, None, scale, 0.0, None, *wanted)
    found: Iterable[Tensor | None] = (None,) * 4
    if any(four):
        da, db = da if need_a else torch.zeros_like(a), db if need_b else torch.zeros_like(b)
        found = _khatri_rao_backward(da, db, *factors, *four)
    found = (g if need else None for g, need in zip(found, four, strict=True))
    return dx if need_x else None, dbias if need_bias else None, *found


def _plain_gradients(
    needs: Sequence[bool], scale: float, grad: Tensor, x: Tensor, _hidden: Tensor, weight: Tensor, *factors: Tensor
) -> tuple[Any, ...]:
    hidden = linear(x, _khatri_rao(*factors, x.dtype)[0])
    return _low_rank_gradients(needs, scale, grad, x, hidden, weight, *factors)


class _Written(torch.autograd.Function):
    """A product with the written weight, which is written again for the backward pass."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, scales: tuple[float, ...], *factors: Tensor) -> Tensor:
        return linear(x, _write(weight, scales, factors), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _bias, ctx.scales, *factors = inputs
        ctx.save_for_backward(x, weight, *factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        dx, dbias, *found = run_backward(_written_gradients, needs, ctx.scales, grad, *ctx.saved_tensors)
        return dx, None, dbias, None, *found


def _written_gradients(
    needs: Sequence[bool], scales: Sequence[float], grad: Tensor, x: Tensor, weight: Tensor, *factors: Tensor
) -> tuple[Any, ...]:
    need_x, _, need_bias, _, *four = needs
    dx = grad @ _write(weight, scales, factors) if need_x else None
    rows, inputs = grad.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
    return dx, rows.sum(0) if need_bias else None, *_contract(rows, inputs, scales, factors, four)


def _write(weight: Tensor, scales: Sequence[float], factors: Sequence[Tensor]) -> Tensor:
    for i, scale in enumerate(scales):
        weight = _weight(weight, *factors[4 * i : 4 * i + 4], scale)
    return weight


def _contract(
    grad: Tensor, x: Tensor, scales: Sequence[float], factors: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients in all factors, from an eighth of the rows of the weight's gradient at a time."""
    found: list[Tensor | None] = [torch.zeros_like(f) if n else None for f, n in zip(factors, needs, strict=True)]
    if not any(needs):
        return found
    out = grad.shape[1]
    step = max(64, -(-out // 8))
    for start in range(0, out, step):
        part = slice(start, start + step)
        tile = wide_product(grad[:, part].mT, x)
        for i, scale in enumerate(scales):
            at = slice(4 * i, 4 * i + 4)
            w1_a, w1_b, w2_a, w2_b = factors[at]
            partial = _weight_backward(tile, w1_a[part], w1_b, w2_a[part], w2_b, scale, *needs[at])
            for j, (total, value) in enumerate(zip(found[at], partial, strict=True)):
                if total is not None:
                    (total[part] if j % 2 == 0 else total).add_(value)
    return found


def hadamard_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Sequence[float], factors: Sequence[Factors]
) -> Tensor:
    """Apply a frozen linear layer and LoHa adapters: ``linear(x, weight + sum_i scale_i * delta_i, bias)``.

    Small ranks become low-rank products, one after the other; the rest is written into the weight. Saved for backward:
    x, the rank-sized product, the factors and a reference to the weight.

    Args:
        x: (..., in), in the dtype of the weight.
        weight: (out, in), frozen.
        bias: (out,) or None.
        scales: one number for each adapter.
        factors: (w1_a, w1_b, w2_a, w2_b) of each adapter, at least one.
    """
    tokens = x.numel() // max(x.shape[-1], 1)
    out, features = weight.shape

    def pays(four: Factors) -> bool:
        return low_rank_pays(tokens, out, features, four[0].shape[1], four[2].shape[1])

    pairs = list(zip(scales, factors, strict=True))
    written = [(scale, four) for scale, four in pairs if not pays(four)]
    added = [(scale, four) for scale, four in pairs if pays(four)]
    if written:
        y = _written_linear(x, weight, bias, written)
    else:
        (scale, four), *added = added
        y = _low_rank_linear(x, weight, bias, scale, four)
    for scale, four in added:
        y = add_hadamard(y, x, scale, four)
    return y


def hadamard_few(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Any, four: Factors) -> Tensor | None:
    """Return `hadamard_linear` of few rows, `unobserved`, and one adapter, or None where operators have to run.

    Neither the factors of rank r1 * r2 nor the changed weight is made.
    """
    module = module_of("hadamard")
    if module is None or type(scale) is not float or type(x) not in ORDINARY or not x.is_cpu:
        return None
    (out, r1), (_, features), (_, r2), _ = (f.shape for f in four)
    if (out, features) != weight.shape or features != x.shape[-1] or not low_rank_pays(1 << 20, out, features, r1, r2):
        return None
    if pays_in_one_pass(x, weight):
        y: Tensor | None = module.few(x, weight, bias, *four, scale, FEW)
        if y is not None:
            return y
    if not usual(x, *four):
        return None
    added = x.new_empty(*x.shape[:-1], out, dtype=torch.float32)
    module.rows(x, *four, scale, added)
    return linear(x, weight, bias).add_(added)


def _low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, four: Factors) -> Tensor:
    if transformed():
        return low_rank_linear(x, weight, bias, *khatri_rao(*four, dtype=x.dtype), scale)
    return registry.apply(_LowRank, x, weight, bias, *four, float(scale))[0]


def _written_linear(x: Tensor, weight: Tensor, bias: Tensor | None, written: list[tuple[float, Factors]]) -> Tensor:
    if transformed():
        for scale, four in written:
            weight = hadamard_weight(weight, *four, scale)
        return linear(x, weight, bias)
    scales = tuple(float(scale) for scale, _ in written)
    return registry.apply(_Written, x, weight, bias, scales, *(factor for _, four in written for factor in four))


def add_hadamard(base: Tensor, x: Tensor, scale: float, four: Factors) -> Tensor:
    """Add ``scale * x @ delta.T`` to the output of a base layer that is a call of its own."""
    tokens = x.numel() // max(x.shape[-1], 1)
    (out, r1), (_, features), (_, r2), _ = (f.shape for f in four)
    if low_rank_pays(tokens, out, features, r1, r2):
        return low_rank_add(base, x, *khatri_rao(*four, dtype=x.dtype), scale)
    delta = hadamard_weight(x.new_zeros(out, features), *four, scale)
    return (base + linear(x, delta)).to(base.dtype)
