"""The gradients of DoRA's output, made of a backend's own gradients of a scale and of a low-rank product."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .wide import wide


def compose_backward(
    scale_backward: Callable,
    low_rank_backward: Callable,
    grad: Tensor,
    base: Tensor,
    x: Tensor,
    hidden: Tensor,
    a: Tensor,
    b: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    scale: float,
    need_base: bool,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    need_gain: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of `dora_compose`, with a backend's own functions; an empty tensor for one not needed.

    The output is a scale of channels plus a low-rank product whose b is ``gain * b``.
    """
    dbase, dgain, dbias = scale_backward(grad, base, gain, bias, 1, need_base, need_gain, need_bias)
    dx = x.new_empty(0)
    da, db = (t.new_empty(0, dtype=wide(t.dtype)) for t in (a, b))
    if need_x or need_a or need_b or need_gain:
        column = gain[:, None]
        factors = a, (b * column).to(b.dtype), None, scale, 0.0, None
        needs = need_x, need_a, need_b or need_gain, False
        dx, da, dscaled, _ = low_rank_backward(grad.to(x.dtype), x, hidden, *factors, *needs)
        if need_gain:
            dgain += (b.to(gain.dtype) * dscaled).sum(1)
        if need_b:
            db = dscaled * column
    return dbase, dx, da, db, dgain, dbias
