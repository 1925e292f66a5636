"""The low-rank product in plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from ..shared.low_rank import Needs, Parameters
from ..shared.philox import dropout
from ..shared.wide import wide_product, widened


def _dropped(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    return x if seed is None else dropout(x, dropout_p, seed)


def _gated(hidden: Tensor, gate: Tensor | None) -> Tensor:
    return hidden if gate is None else (hidden * gate).to(hidden.dtype)


def low_rank_add(base: Tensor, x: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    """Return the sum and the rank-sized product ``dropout(x) @ a.T``; see `peftk.functional.low_rank_add`."""
    a, b, gate, scale, dropout_p, seed = Parameters(*parameters)
    hidden = linear(_dropped(x, dropout_p, seed), a)
    delta = linear(_gated(hidden, gate), b) * scale
    return (base + delta).to(base.dtype), hidden


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Any) -> tuple[Tensor, Tensor]:
    """Return the output and the rank-sized product; see `peftk.functional.low_rank_linear`."""
    return low_rank_add(linear(x, weight, bias), x, *parameters)


def low_rank_add_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, a, b and the gate; an empty tensor for one not needed."""
    (a, b, gate, scale, dropout_p, seed), need = Parameters(*arguments[:6]), Needs(*arguments[6:])
    dx = da = db = dgate = grad.new_empty(0)
    rank = a.shape[0]
    rows = widened(grad.reshape(-1, b.shape[0]))
    gated = rows @ widened(b) * scale
    hidden = widened(hidden)
    if need.gate and gate is not None:
        dgate = gated.view(hidden.shape).to(gate.dtype) * hidden.to(gate.dtype)
        dgate = dgate.reshape(-1, rank).sum(0) if gate.dim() == 1 else dgate
    if need.b:
        db = rows.mT @ _gated(hidden, gate).reshape(-1, rank) * scale
    dhidden = _gated(gated.view(hidden.shape), gate)
    if need.a:
        da = wide_product(dhidden.reshape(-1, rank).mT, _dropped(x, dropout_p, seed).reshape(-1, x.shape[-1]))
    if need.x:
        dx = _dropped((dhidden @ widened(a)).to(x.dtype), dropout_p, seed)
    return dx, da, db, dgate


def low_rank_linear_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, a, b, the gate and the bias; an empty tensor for one not needed."""
    *others, need_bias = arguments
    dx, da, db, dgate = low_rank_add_backward(grad, x, hidden, *others)
    if Needs(*others[6:]).x:
        dx = grad @ weight + dx
    dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else grad.new_empty(0)
    return dx, da, db, dgate, dbias
