"""The low-rank product of LoRA: added to a base output, or to a frozen linear layer in one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.shared.philox import dropout
from ..kernels.shared.wide import wide
from ..runtime import registry
from ..runtime.timings import power_bucket
from . import _seed
from ._autograd import run_backward
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
from ._low_rank_costs import (
    _add_backward_flops,
    _add_flops,
    _hidden,
    _linear_backward_flops,
    _linear_flops,
    _rows,
)
from .plain import ordinary

__all__ = ["low_rank_add", "low_rank_linear"]


def _check_factors(x: Tensor, a: Tensor, b: Tensor) -> None:
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least 1 dimension (..., in_features); got a 0-dimensional tensor")
    check_tensor("a", a, like=x)
    check_tensor("b", b, like=x)
    features = x.shape[-1]
    if a.dim() != 2 or a.shape[1] != features or a.shape[0] == 0:
        raise ValueError(
            f"a: expected shape (rank, in_features) = (rank, {features}) with rank >= 1; got {tuple(a.shape)}"
        )
    if b.dim() != 2 or b.shape[1] != a.shape[0]:
        raise ValueError(f"b: expected shape (out_features, rank) = (any, {a.shape[0]}); got {tuple(b.shape)}")


def _check_add(base: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    _check_factors(x, a, b)
    check_tensor("base", base, like=x)
    check_shape("base", base, (*x.shape[:-1], b.shape[0]), "(..., out_features)")


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> None:
    _check_factors(x, a, b)
    check_tensor("weight", weight, like=x)
    check_frozen("weight", weight)
    check_shape("weight", weight, (b.shape[0], x.shape[-1]), "(out_features, in_features)")
    if bias is not None:
        check_tensor("bias", bias, like=x)
        check_shape("bias", bias, (weight.shape[0],), "(out_features,)")


def _fits_add(base: Tensor, x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Say cheaply whether the arguments are right; `_check_add` finds out what is wrong."""
    try:
        (rank, features), (out, columns), shape = a.shape, b.shape, x.shape
        return (
            columns == rank > 0
            and shape[-1] == features
            and base.shape == (*shape[:-1], out)
            and ordinary(x, a, b, base)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _fits_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> bool:
    """Say cheaply whether the arguments are right; `_check_linear` finds out what is wrong."""
    try:
        (rank, features), (out, columns) = a.shape, b.shape
        return (
            columns == rank > 0
            and x.shape[-1] == features
            and weight.shape == (out, features)
            and not weight.requires_grad
            and (bias is None or bias.shape == (out,))
            and ordinary(x, a, b, weight, bias)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _prepare_gate(x: Tensor, a: Tensor, scale: float | Tensor, gate: Tensor | None) -> tuple[Tensor | None, float]:
    """Return the gate and a Python scale; a scale that is a tensor becomes part of the gate."""
    if gate is None and type(scale) is float and -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        return None, scale
    rank = a.shape[0]
    if gate is not None:
        check_tensor("gate", gate, like=x)
        if tuple(gate.shape) not in ((rank,), (*x.shape[:-1], rank)):
            raise ValueError(
                f"gate: expected shape (rank,) = ({rank},) or (..., rank) = {(*x.shape[:-1], rank)}; "
                f"got {tuple(gate.shape)}"
            )
    if not isinstance(scale, Tensor):
        return gate, check_scale(scale, x.dtype)
    scale = check_scale_tensor(scale, x)
    return (scale.expand(rank) if gate is None else gate * scale), 1.0


def _prepare_dropout(dropout_p: float, seed: Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    if type(dropout_p) is float and dropout_p == 0.0:
        return 0.0, None
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a number; got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1; got {dropout_p}")
    if dropout_p == 0.0:
        return 0.0, None
    if seed is None:
        seed = _seed.draw_seed(device)
    elif not isinstance(seed, Tensor) or seed.dtype is not torch.int64 or seed.dim() or seed.device.type != "cpu":
        got = f"{seed.dtype} {tuple(seed.shape)} on {seed.device}" if isinstance(seed, Tensor) else repr(seed)
        raise TypeError(f"seed: expected a 0-dimensional int64 tensor on the CPU; got {got}")
    return float(dropout_p), seed


def _exact_gate(gate: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the gate, which is small, in float32 at least."""
    return cast(gate, torch.float64 if dtype is torch.float64 else torch.float32)


def _prepare_add(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor = 1.0,
    *,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Any, ...]:
    if not _fits_add(base, x, a, b):
        _check_add(base, x, a, b)
    gate, scale = _prepare_gate(x, a, scale, gate)
    b, scale = fold_zero(b, scale)
    x = autocast_input(x)
    return base, x, a, b, _exact_gate(gate, x.dtype), scale, *_prepare_dropout(dropout_p, seed, x.device)


def _prepare_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor = 1.0,
    *,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Any, ...]:
    if not _fits_linear(x, weight, bias, a, b):
        _check_linear(x, weight, bias, a, b)
    if gate is not None or type(scale) is not float or not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        gate, scale = _prepare_gate(x, a, scale, gate)
    if scale == 0.0:
        b, scale = fold_zero(b, scale)
    if torch._C._is_any_autocast_enabled():
        x = autocast_input(x)
    dtype = x.dtype
    weight = weight if weight.dtype is dtype else cast(weight, dtype)
    bias = bias if bias is None or bias.dtype is dtype else cast(bias, dtype)
    gate = None if gate is None else _exact_gate(gate, dtype)
    if type(dropout_p) is float and dropout_p == 0.0:
        return x, weight, bias, a, b, gate, scale, 0.0, None
    return x, weight, bias, a, b, gate, scale, *_prepare_dropout(dropout_p, seed, x.device)


def _rounded_factors(args: tuple[Any, ...], first: int) -> tuple[Any, ...]:
    """Return the arguments of an operator, the factors, which stand from `first` on, in the dtype of x."""
    a, b = args[first : first + 2]
    dtype = args[1].dtype if first == 2 else args[0].dtype
    if a.dtype is dtype and b.dtype is dtype:
        return args
    # Rounding the small factors is the cast that PEFT applies to x itself, at full size.
    return *args[:first], a.to(dtype), b.to(dtype), *args[first + 2 :]


def _gradients(
    x: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, need_x: bool, need_a: bool, need_b: bool, need_gate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        a.new_empty(a.shape if need_a else 0, dtype=wide(a.dtype)),
        b.new_empty(b.shape if need_b else 0, dtype=wide(b.dtype)),
        x.new_empty(0) if gate is None or not need_gate else gate.new_empty(gate.shape),
    )


_FACTORS = "Tensor a, Tensor b, Tensor? gate, float scale, float dropout_p, Tensor? seed"
_NEEDS = "bool need_x, bool need_a, bool need_b, bool need_gate"

_add = registry.define(
    "low_rank",
    f"low_rank_add(Tensor base, Tensor x, {_FACTORS}) -> (Tensor, Tensor)",
    fake=lambda base, x, a, *_: (base.new_empty(base.shape), _hidden(x, a)),
    flops=_add_flops,
    bucket=lambda base, x, a, b, *_: power_bucket(_rows(x), b.shape[0], *reversed(a.shape)),
    prepare=lambda *args, **kwargs: _rounded_factors(_prepare_add(*args, **kwargs), 2),
)

_add_backward = registry.define(
    "low_rank",
    f"low_rank_add_backward(Tensor grad, Tensor x, Tensor hidden, {_FACTORS}, {_NEEDS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda grad, x, hidden, a, b, gate, scale, dropout_p, seed, *needs: _gradients(x, a, b, gate, *needs),
    flops=_add_backward_flops,
    bucket=lambda grad, x, hidden, a, b, *_: power_bucket(_rows(x), b.shape[0], *reversed(a.shape)),
)

_linear = registry.define(
    "low_rank",
    f"low_rank_linear(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}) -> (Tensor, Tensor)",
    fake=lambda x, weight, bias, a, *_: (x.new_empty(*x.shape[:-1], weight.shape[0]), _hidden(x, a)),
    flops=_linear_flops,
    bucket=lambda x, weight, bias, a, b, *_: power_bucket(_rows(x), *weight.shape, a.shape[0]),
    prepare=lambda *args, **kwargs: _rounded_factors(_prepare_linear(*args, **kwargs), 3),
)

_linear_backward = registry.define(
    "low_rank",
    f"low_rank_linear_backward(Tensor grad, Tensor x, Tensor hidden, Tensor weight, {_FACTORS}, {_NEEDS},"
    " bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda grad, x, hidden, weight, a, b, gate, scale, dropout_p, seed, *needs: (
        *_gradients(x, a, b, gate, *needs[:4]),
        grad.new_empty(weight.shape[0] if needs[4] else 0),
    ),
    flops=_linear_backward_flops,
    bucket=lambda grad, x, hidden, weight, a, *_: power_bucket(_rows(x), *weight.shape, a.shape[0]),
)


def _wanted(gradients: tuple[Any, ...], needs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([g if need else None for g, need in zip(gradients, needs, strict=True)])


def _again(x: Tensor, a: Tensor, _b: Any, _gate: Any, _scale: Any, dropout_p: float, seed: Any, *_: bool) -> Tensor:
    """Return the rank-sized product that a forward pass saved, as a function of x and a."""
    return linear(x if seed is None else dropout(x, dropout_p, seed), a)


def _plain_add(grad: Tensor, x: Tensor, _hidden: Tensor, *others: Any) -> Any:
    return _add_backward(grad, x, _again(x, *others), *others)


def _plain_linear(grad: Tensor, x: Tensor, _hidden: Tensor, weight: Tensor, *others: Any) -> Any:
    return _linear_backward(grad, x, _again(x, *others), weight, *others)


class LowRankAdd(torch.autograd.Function):
    """Autograd for `low_rank_add`."""

    # Every argument by name: a compiler reads the signature to tell this from a forward that takes a context.
    @staticmethod
    def forward(
        base: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        gate: Tensor | None,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run the operator. The factors are rounded here, so that no gradient of them passes through a rounding."""
        return _add(*_rounded_factors((base, x, a, b, gate, scale, dropout_p, seed), 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save x and the rank-sized product."""
        _base, x, a, b, gate, ctx.scale, ctx.dropout_p, seed = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1], a, b, gate, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        """Run the backward operator; the gradient of the base output is the incoming one."""
        if grad is None:
            return (None,) * 8
        x, hidden, a, b, gate, seed = ctx.saved_tensors
        need_base, *needs = ctx.needs_input_grad[:5]
        args = grad.to(x.dtype), x, hidden, a.to(x.dtype), b.to(x.dtype), gate, ctx.scale, ctx.dropout_p, seed, *needs
        gradients = run_backward(_add_backward, *args, plain=_plain_add) if any(needs) else (None,) * 4
        return (grad if need_base else None, *_wanted(gradients, needs), None, None, None)


class LowRankLinear(torch.autograd.Function):
    """Autograd for `low_rank_linear`."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        gate: Tensor | None,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run the operator. The factors are rounded here, so that no gradient of them passes through a rounding."""
        if a.dtype is x.dtype and b.dtype is x.dtype:
            return _linear(x, weight, bias, a, b, gate, scale, dropout_p, seed)
        return _linear(*_rounded_factors((x, weight, bias, a, b, gate, scale, dropout_p, seed), 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save x, the rank-sized product and a reference to the frozen weight."""
        x, weight, _bias, a, b, gate, ctx.scale, ctx.dropout_p, seed = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1], weight, a, b, gate, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        """Run the backward operator."""
        if grad is None:
            return (None,) * 9
        x, hidden, weight, a, b, gate, seed = ctx.saved_tensors
        need_x, _, need_bias, *needs = ctx.needs_input_grad[:6]
        needs = need_x, *needs, need_bias
        a, b = a.to(x.dtype), b.to(x.dtype)
        args = grad, x, hidden, weight, a, b, gate, ctx.scale, ctx.dropout_p, seed, *needs
        dx, da, db, dgate, dbias = run_backward(_linear_backward, *args, plain=_plain_linear)
        return (
            *(dx if need_x else None, None, dbias if need_bias else None, da if needs[1] else None),
            *(db if needs[2] else None, dgate if needs[3] else None, None, None, None),
        )


def low_rank_add(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor = 1.0,
    *,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Add a low-rank product to the output of a base layer: LoRA where the base layer stays a layer of its own.

    ``base + scale * ((dropout(x) @ a.T) * gate) @ b.T``

    Args:
        base: output of the base layer, (..., out_features); it is not written to.
        x: activations, (..., in_features), float64, float32, bfloat16 or float16.
        a: (rank, in_features), any floating dtype; rounded to the dtype of x, as is b.
        b: (out_features, rank).
        scale: a finite number, or a 0-dimensional tensor, which may require grad.
        gate: None, (rank,), or (..., rank) for a gate of its own for every token.
        dropout_p: probability with which an element of x is dropped for this product, 0 <= dropout_p < 1.
        seed: 0-dimensional int64 CPU tensor that decides which; drawn from torch's default generator if None.
            Element i of x, counted row by row, is dropped by Philox4x32-10 of (seed, i) on every backend.

    Returns:
        (..., out_features) in the dtype of ``base``.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x, the (..., rank) product, the factors and the seed; never a mask.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.

    Example:
        >>> import peftk, torch
        >>> x, a, b = torch.ones(1, 3), torch.ones(2, 3), torch.ones(4, 2)
        >>> peftk.functional.low_rank_add(torch.zeros(1, 4), x, a, b, scale=0.5)
        tensor([[3., 3., 3., 3.]])
    """
    return registry.apply(LowRankAdd, *_prepare_add(base, x, a, b, scale, gate=gate, dropout_p=dropout_p, seed=seed))[0]


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor = 1.0,
    *,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Apply a frozen linear layer and its LoRA adapter in one operator.

    ``linear(x, weight, bias) + scale * ((dropout(x) @ a.T) * gate) @ b.T``; the products accumulate in one
    buffer, forward and backward.

    Args:
        x: activations, (..., in_features), float64, float32, bfloat16 or float16.
        weight: frozen weight, (out_features, in_features).
        bias: (out_features,) or None; may require grad.
        a: see `low_rank_add`; so are b, scale, gate, dropout_p and seed.
        b: see `low_rank_add`.
        scale: see `low_rank_add`.
        gate: see `low_rank_add`.
        dropout_p: see `low_rank_add`.
        seed: see `low_rank_add`.

    Returns:
        (..., out_features) in the dtype of x (its autocast dtype under autocast).

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit, or if the weight requires grad.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x, the (..., rank) product, the factors, the seed and a reference to the weight.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.

    Example:
        >>> import peftk, torch
        >>> x, weight, a, b = torch.randn(5, 3), torch.randn(4, 3), torch.randn(2, 3), torch.zeros(4, 2)
        >>> torch.equal(peftk.functional.low_rank_linear(x, weight, None, a, b), x @ weight.T)
        True
    """
    return registry.apply(
        LowRankLinear, *_prepare_linear(x, weight, bias, a, b, scale, gate=gate, dropout_p=dropout_p, seed=seed)
    )[0]
