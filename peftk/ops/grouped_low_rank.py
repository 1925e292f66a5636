"""The low-rank product of many groups of rows, each with factors of its own: experts, and batches of many adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.shared.grouped_low_rank import shrunk
from ..kernels.shared.wide import wide
from ..runtime import registry
from ..runtime.timings import power_bucket
from ._autograd import run_backward
from ._checks import autocast_input, cast, check_frozen, check_scale, check_shape, check_tensor, fold_zero
from .plain import ordinary

__all__ = ["grouped_low_rank_add", "grouped_low_rank_linear"]


def _check_offsets(offsets: object, x: Tensor, groups: int) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets: expected a torch.Tensor; got {type(offsets).__name__}")
    if offsets.is_nested or offsets.layout is not torch.strided:
        got = "a nested one" if offsets.is_nested else f"layout {offsets.layout}"
        raise ValueError(f"offsets: expected a strided tensor; got {got}")
    if offsets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"offsets: expected dtype int64 or int32; got {offsets.dtype}")
    if offsets.device != x.device:
        raise ValueError(f"offsets: expected a tensor on {x.device}, as x is; got one on {offsets.device}")
    check_shape("offsets", offsets, (groups,), "(groups,)")


def _check_groups(x: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> None:
    check_tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected 2 dimensions, (rows, in_features); got shape {tuple(x.shape)}")
    check_tensor("a", a, like=x)
    check_tensor("b", b, like=x)
    features = x.shape[1]
    if a.dim() != 3 or a.shape[2] != features or 0 in a.shape[:2]:
        raise ValueError(
            f"a: expected shape (groups, rank, in_features) = (groups, rank, {features}) with groups, rank >= 1; "
            f"got {tuple(a.shape)}"
        )
    groups, rank, _ = a.shape
    check_shape("b", b, (groups, None, rank), "(groups, out_features, rank)")
    _check_offsets(offsets, x, groups)


def _check_add(base: Tensor, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> None:
    _check_groups(x, a, b, offsets)
    check_tensor("base", base, like=x)
    check_shape("base", base, (x.shape[0], b.shape[1]), "(rows, out_features)")


def _check_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> None:
    _check_groups(x, a, b, offsets)
    check_tensor("weight", weight, like=x)
    check_frozen("weight", weight)
    check_shape("weight", weight, (*b.shape[:2], x.shape[1]), "(groups, out_features, in_features)")


def _fit(x: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> bool:
    (groups, rank, features), (of_b, _, columns), (_, width) = a.shape, b.shape, x.shape
    return (
        groups == of_b > 0
        and rank == columns > 0
        and features == width
        and offsets.shape == (groups,)
        and offsets.dtype in (torch.int64, torch.int32)
        and offsets.layout is torch.strided
        and offsets.device == x.device
    )


def _fits_add(base: Tensor, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> bool:
    """Say cheaply whether the arguments are right; `_check_add` finds out what is wrong."""
    try:
        return _fit(x, a, b, offsets) and base.shape == (x.shape[0], b.shape[1]) and ordinary(x, a, b, base)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _fits_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> bool:
    """Say cheaply whether the arguments are right; `_check_linear` finds out what is wrong."""
    try:
        return (
            _fit(x, a, b, offsets)
            and weight.shape == (*b.shape[:2], x.shape[1])
            and not weight.requires_grad
            and ordinary(x, a, b, weight)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _scaled(b: Tensor, scale: object, x: Tensor) -> tuple[Tensor, float]:
    """Return the second factors and a Python scale; scales that are a tensor become part of the factors."""
    if not isinstance(scale, Tensor):
        return fold_zero(b, check_scale(scale, x.dtype))
    check_tensor("scale", scale)
    if tuple(scale.shape) not in ((), (b.shape[0],)):
        raise ValueError(
            f"scale: expected a number, or a tensor of shape () or (groups,) = ({b.shape[0]},); "
            f"got shape {tuple(scale.shape)}"
        )
    if not scale.is_cpu:
        check_tensor("scale", scale, like=x)
    # Wide enough for a factor in half precision: what is scaled is rounded once.
    scale = scale.to(x.device, wide(b.dtype))
    return b * scale.reshape(-1, 1, 1), 1.0


def _prepare_add(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    scale: float | Tensor = 1.0,
    *,
    gate: Tensor | None = None,
) -> tuple[Any, ...]:
    if not _fits_add(base, x, a, b, offsets):
        _check_add(base, x, a, b, offsets)
    return base, *_prepare_adapter(x, a, b, offsets, scale, gate)


def _prepare_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    scale: float | Tensor = 1.0,
    *,
    gate: Tensor | None = None,
) -> tuple[Any, ...]:
    if not _fits_linear(x, weight, a, b, offsets):
        _check_linear(x, weight, a, b, offsets)
    x, *adapter = _prepare_adapter(x, a, b, offsets, scale, gate)
    return x, weight, *adapter


def _prepare_adapter(
    x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, scale: float | Tensor, gate: Tensor | None
) -> tuple[Any, ...]:
    if gate is not None:
        check_tensor("gate", gate, like=x)
        check_shape("gate", gate, (x.shape[0], a.shape[1]), "(rows, rank)")
    b, number = _scaled(b, scale, x)
    x = autocast_input(x)
    gate = cast(gate, torch.float64 if x.dtype is torch.float64 else torch.float32)
    return x, a, b, offsets, gate, number


def _flops(_base: object, x: torch.Size, a: torch.Size, b: torch.Size, *_args: object, **_kw: object) -> int:
    return 2 * x[0] * a[1] * (a[2] + b[1])


def _backward_flops(
    _grad: object, x: torch.Size, _hidden: object, a: torch.Size, b: torch.Size, *_args: object, **_kw: object
) -> int:
    return 4 * x[0] * a[1] * (a[2] + b[1])


def _linear_flops(x: torch.Size, weight: torch.Size, *adapter: Any, **keywords: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2] + _flops(None, x, *adapter, **keywords)


def _linear_backward_flops(
    grad: torch.Size, x: torch.Size, hidden: object, weight: torch.Size, *adapter: Any, **keywords: Any
) -> int:
    needs_x = bool(adapter[5]) if len(adapter) > 5 else True
    base = 2 * x[0] * weight[1] * weight[2] if needs_x else 0
    return base + _backward_flops(grad, x, hidden, *adapter, **keywords)


def _gradients(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    _offsets: Tensor,
    gate: Tensor | None,
    _scale: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        a.new_empty(a.shape if need_a else 0, dtype=wide(a.dtype)),
        b.new_empty(b.shape if need_b else 0, dtype=wide(b.dtype)),
        x.new_empty(0) if gate is None or not need_gate else gate.new_empty(gate.shape),
    )


def _rounded_add(base: Tensor, x: Tensor, a: Tensor, b: Tensor, *others: Any) -> tuple[Any, ...]:
    """Return the arguments of the operator, the factors in the dtype of x."""
    return base, x, cast(a, x.dtype), cast(b, x.dtype), *others


def _rounded_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *others: Any) -> tuple[Any, ...]:
    """Return the arguments of the operator, the factors in the dtype of x."""
    return x, weight, cast(a, x.dtype), cast(b, x.dtype), *others


_ADAPTER = "Tensor a, Tensor b, Tensor offsets, Tensor? gate, float scale"
_NEEDS = "bool need_x, bool need_a, bool need_b, bool need_gate"

_add = registry.define(
    "grouped_low_rank",
    f"grouped_low_rank_add(Tensor base, Tensor x, {_ADAPTER}) -> (Tensor, Tensor)",
    fake=lambda base, x, a, *_: (base.new_empty(base.shape), x.new_empty(x.shape[0], a.shape[1])),
    flops=_flops,
    bucket=lambda base, x, a, b, *_: power_bucket(x.shape[0], b.shape[1], a.shape[2], a.shape[1], a.shape[0]),
    prepare=lambda *args, **kwargs: _rounded_add(*_prepare_add(*args, **kwargs)),
)

_add_backward = registry.define(
    "grouped_low_rank",
    f"grouped_low_rank_add_backward(Tensor grad, Tensor x, Tensor hidden, {_ADAPTER}, {_NEEDS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda grad, x, hidden, *adapter: _gradients(x, *adapter),
    flops=_backward_flops,
    bucket=lambda grad, x, hidden, a, b, *_: power_bucket(x.shape[0], b.shape[1], a.shape[2], a.shape[1], a.shape[0]),
)

_linear = registry.define(
    "grouped_low_rank",
    f"grouped_low_rank_linear(Tensor x, Tensor weight, {_ADAPTER}) -> (Tensor, Tensor)",
    fake=lambda x, weight, a, *_: (x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], a.shape[1])),
    flops=_linear_flops,
    bucket=lambda x, weight, a, b, *_: power_bucket(x.shape[0], b.shape[1], a.shape[2], a.shape[1], a.shape[0]),
    prepare=lambda *args, **kwargs: _rounded_linear(*_prepare_linear(*args, **kwargs)),
)

_linear_backward = registry.define(
    "grouped_low_rank",
    f"grouped_low_rank_linear_backward(Tensor grad, Tensor x, Tensor hidden, Tensor weight, {_ADAPTER}, {_NEEDS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda grad, x, hidden, weight, *adapter: _gradients(x, *adapter),
    flops=_linear_backward_flops,
    bucket=lambda grad, x, hidden, weight, a, b, *_: power_bucket(
        x.shape[0], b.shape[1], a.shape[2], a.shape[1], a.shape[0]
    ),
)


def _plain_add(grad: Tensor, x: Tensor, _hidden: Tensor, a: Tensor, b: Tensor, offsets: Tensor, *others: Any) -> Any:
    """Run the backward pass as a function of x and a, from which the saved rank-sized product comes."""
    return _add_backward(grad, x, shrunk(x, a, offsets), a, b, offsets, *others)


def _plain_linear(
    grad: Tensor, x: Tensor, _hidden: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor, *others: Any
) -> Any:
    return _linear_backward(grad, x, shrunk(x, a, offsets), weight, a, b, offsets, *others)


class GroupedLowRankAdd(torch.autograd.Function):
    """Autograd for `grouped_low_rank_add`."""

    @staticmethod
    def forward(
        base: Tensor, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, gate: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Run the operator. The factors are rounded here, so that no gradient of them passes through a rounding."""
        return _add(*_rounded_add(base, x, a, b, offsets, gate, scale))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save x and the rank-sized product."""
        _base, x, a, b, offsets, gate, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1], a, b, offsets, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        """Run the backward operator; the gradient of the base output is the incoming one."""
        if grad is None:
            return (None,) * 7
        x, hidden, a, b, offsets, gate = ctx.saved_tensors
        need_base, *needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 5)]
        dx = da = db = dgate = None
        if any(needs):
            factors = cast(a, x.dtype), cast(b, x.dtype), offsets, gate
            dx, da, db, dgate = run_backward(
                _add_backward, grad.to(x.dtype), x, hidden, *factors, ctx.scale, *needs, plain=_plain_add
            )
        return (
            *(grad if need_base else None, dx if needs[0] else None, da if needs[1] else None),
            *(db if needs[2] else None, None, dgate if needs[3] else None, None),
        )


class GroupedLowRankLinear(torch.autograd.Function):
    """Autograd for `grouped_low_rank_linear`."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor, gate: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Run the operator. The factors are rounded here, so that no gradient of them passes through a rounding."""
        return _linear(*_rounded_linear(x, weight, a, b, offsets, gate, scale))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save x, the rank-sized product and a reference to the frozen weights."""
        x, weight, a, b, offsets, gate, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1], weight, a, b, offsets, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        """Run the backward operator."""
        if grad is None:
            return (None,) * 7
        x, hidden, weight, a, b, offsets, gate = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 5)]
        adapter = cast(a, x.dtype), cast(b, x.dtype), offsets, gate, ctx.scale
        gradients = run_backward(_linear_backward, grad, x, hidden, weight, *adapter, *needs, plain=_plain_linear)
        dx, da, db, dgate = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return dx, None, da, db, None, dgate, None


def grouped_low_rank_add(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    scale: float | Tensor = 1.0,
    *,
    gate: Tensor | None = None,
) -> Tensor:
    """Add low-rank products to rows that are sorted by group: LoRA of stacked experts, and of many adapters at once.

    ``base[rows] + scale[g] * ((x[rows] @ a[g].T) * gate[rows]) @ b[g].T`` for the rows of every group g.

    Args:
        base: output of any grouped or plain product, (rows, out_features); it is not written to.
        x: activations, (rows, in_features), float64, float32, bfloat16 or float16.
        a: (groups, rank, in_features), any floating dtype; rounded to the dtype of x, as is b.
        b: (groups, out_features, rank).
        offsets: (groups,), int64 or int32, on the device of x: the row at which each group ends and the next one
            starts. Groups may be empty. Rows from the last end on belong to no group and keep their base. On a GPU
            the kernels read it where it is and nothing waits for it.
        scale: a finite number, or a tensor of shape () or (groups,), which may require grad.
        gate: None, or (rows, rank).

    Returns:
        (rows, out_features) in the dtype of ``base``.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit; on a CPU also if the ends of the groups do not ascend or
            exceed the rows. On a GPU such ends make every result NaN.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x, the (rows, rank) product, the factors and the offsets.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; products of groups of
    rows: Gale et al., MegaBlocks: Efficient Sparse Training with Mixture-of-Experts, arXiv 2211.15841.

    Example:
        >>> import peftk, torch
        >>> x, a, b = torch.ones(3, 2), torch.ones(2, 1, 2), torch.tensor([[[1.0]], [[10.0]]])
        >>> peftk.functional.grouped_low_rank_add(torch.zeros(3, 1), x, a, b, torch.tensor([1, 3]))
        tensor([[ 2.],
                [20.],
                [20.]])
    """
    return registry.apply(GroupedLowRankAdd, *_prepare_add(base, x, a, b, offsets, scale, gate=gate))[0]


def grouped_low_rank_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    scale: float | Tensor = 1.0,
    *,
    gate: Tensor | None = None,
) -> Tensor:
    """Multiply rows that are sorted by group by the frozen weight of their group, its LoRA adapter included.

    ``x[rows] @ weight[g].T + scale[g] * ((x[rows] @ a[g].T) * gate[rows]) @ b[g].T`` for the rows of every group g; the
    products accumulate in one buffer, forward and backward.

    Args:
        x: activations, (rows, in_features), float64, float32, bfloat16 or float16.
        weight: frozen weights, (groups, out_features, in_features), of any strides.
        a: see `grouped_low_rank_add`; so are b, offsets, scale and gate.
        b: see `grouped_low_rank_add`.
        offsets: see `grouped_low_rank_add`; rows of no group are zero.
        scale: see `grouped_low_rank_add`.
        gate: see `grouped_low_rank_add`.

    Returns:
        (rows, out_features) in the dtype of x (its autocast dtype under autocast).

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or numbers do not fit, or if the weight requires grad; on a CPU also if the ends
            of the groups do not ascend or exceed the rows. On a GPU such ends make every result NaN.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x, the (rows, rank) product, the factors, the offsets and a reference to the weights.

    Source: see `grouped_low_rank_add`.

    Example:
        >>> import peftk, torch
        >>> x, weight, a, b = torch.ones(3, 2), torch.ones(2, 1, 2), torch.ones(2, 1, 2), torch.ones(2, 1, 1)
        >>> peftk.functional.grouped_low_rank_linear(x, weight, a, 10 * b, torch.tensor([1, 3]))
        tensor([[22.],
                [22.],
                [22.]])
    """
    return registry.apply(GroupedLowRankLinear, *_prepare_linear(x, weight, a, b, offsets, scale, gate=gate))[0]
