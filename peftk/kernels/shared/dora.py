"""The gradients of DoRA's output, made of a backend's own gradients of a scale and of a low-rank product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .wide import wide


class Composed(NamedTuple):
    """The tensors and the factor of `dora_compose_backward`, in the order of the operator."""

    grad: Tensor
    base: Tensor
    x: Tensor
    hidden: Tensor
    a: Tensor
    b: Tensor
    gain: Tensor
    bias: Tensor | None
    scale: float


class Needs(NamedTuple):
    """Which gradients of it are asked for."""

    base: bool
    x: bool
    a: bool
    b: bool
    gain: bool
    bias: bool


def compose_backward(
    scale_backward: Callable[..., Any], low_rank_backward: Callable[..., Any], *arguments: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of `dora_compose`, with a backend's own functions; an empty tensor for one not needed.

    The output is a scale of channels plus a low-rank product whose b is ``gain * b``.
    """
    (grad, base, x, hidden, a, b, gain, bias, scale), need = Composed(*arguments[:9]), Needs(*arguments[9:])
    dbase, dgain, dbias = scale_backward(grad, base, gain, bias, 1, need.base, need.gain, need.bias)
    dx = x.new_empty(0)
    da, db = (t.new_empty(0, dtype=wide(t.dtype)) for t in (a, b))
    if need.x or need.a or need.b or need.gain:
        column = gain[:, None]
        factors = a, (b * column).to(b.dtype), None, scale, 0.0, None
        needs = need.x, need.a, need.b or need.gain, False
        dx, da, dscaled, _ = low_rank_backward(grad.to(x.dtype), x, hidden, *factors, *needs)
        if need.gain:
            dgain += (b.to(gain.dtype) * dscaled).sum(1)
        if need.b:
            db = dscaled * column
    return dbase, dx, da, db, dgain, dbias
