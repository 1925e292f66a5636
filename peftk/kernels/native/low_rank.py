"""The low-rank product on the CPU: large products are torch's own, in place; thin ones and dropout are C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ... import _C
from ..shared.low_rank import Needs, Parameters
from ..shared.philox import dropout_threshold
from ..shared.wide import HALF, widened
from ._supports import supports_activations
from .wide_product import narrow, wide_product

# Looked up once: the look-up of an operator by name costs as much as a small kernel.
_fused = torch.ops.peftk_native.low_rank.default
_fused_backward = torch.ops.peftk_native.low_rank_backward.default
_dropout = torch.ops.peftk_native.dropout.default


def _reason(x: Tensor, seed: Tensor | None) -> str | None:
    if not x.is_cpu:
        return f"the C++ kernels take CPU tensors; got one on {x.device}"
    return None if seed is None else supports_activations(x)


def _dropout_(x: Tensor, dropout_p: float, seed: Tensor, out: Tensor) -> Tensor:
    _dropout(x, int(seed), dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p), out)
    return out


def _as_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """Undo `_as_rows`: give rows the leading dimensions of x."""
    return rows if x.dim() == 2 else rows.view(*x.shape[:-1], rows.shape[-1])


def _dropped_rows(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    rows = _as_rows(x)
    return _dropout_(rows.contiguous(), dropout_p, seed, rows.new_empty(rows.shape))


def _gated(hidden: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return hidden
    return (hidden * (gate if gate.dim() == 1 else _as_rows(gate))).to(hidden.dtype)


# The range in which one pass in C++ beats the separate products of torch's libraries, which are better on AVX-512.
_THIN_RANK, _THIN_ROWS = (8, 512) if _C.cpu_capability() == "avx512" else (32, 64)


def _thin(rows: Tensor, rank: int) -> bool:
    return rows.dtype is torch.float32 and rank <= _THIN_RANK and rows.shape[0] >= _THIN_ROWS


def _gate_rows(gate: Tensor) -> Tensor:
    return (gate if gate.dim() == 1 else _as_rows(gate)).contiguous()


def shrink(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the rank-sized product alone, ``rows @ a.T``."""
    if not _thin(rows, a.shape[0]):
        return linear(rows, a)
    hidden = rows.new_empty(rows.shape[0], a.shape[0])
    _fused(rows.contiguous(), a.contiguous(), b.contiguous(), None, 1.0, rows.new_empty(0), hidden)
    return hidden


def _expand_(out: Tensor, x: Tensor, parameters: Parameters) -> Tensor:
    """Add the low-rank product onto a contiguous buffer that nobody else holds; return the rank-sized product."""
    a, b, gate, scale, dropout_p, seed = parameters
    flat = x.dim() == 2
    rows = x if flat else _as_rows(x)
    sums = out if flat else _as_rows(out)
    if seed is not None:
        rows = _dropped_rows(rows, dropout_p, seed)
    if _thin(rows, a.shape[0]):
        hidden = rows.new_empty(rows.shape[0], a.shape[0])
        gate = None if gate is None else _gate_rows(gate)
        _fused(rows.contiguous(), a.contiguous(), b.contiguous(), gate, scale, sums, hidden)
    else:
        hidden = linear(rows, a)
        sums.addmm_(hidden if gate is None else _gated(hidden, gate), b.mT, alpha=scale)
    return hidden if flat else _like(hidden, x)


def low_rank_add_supports(base: Tensor, x: Tensor, *parameters: Any) -> str | None:
    """Return None, or why the call cannot run in place."""
    if base.dtype is not x.dtype:
        return f"base and x must share a dtype to be accumulated in place; got {base.dtype} and {x.dtype}"
    return _reason(x, parameters[-1])


def low_rank_add(base: Tensor, x: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    """Return the sum and the rank-sized product ``dropout(x) @ a.T``; see `peftk.functional.low_rank_add`."""
    a, b, gate, scale, dropout_p, seed = adapter = Parameters(*parameters)
    if _thin(_as_rows(x), a.shape[0]):
        out = base.clone(memory_format=torch.contiguous_format)
        return out, _expand_(out, x, adapter)
    hidden = linear(_as_rows(x) if seed is None else _dropped_rows(x, dropout_p, seed), a)
    rows = torch.addmm(_as_rows(base), _gated(hidden, gate), b.mT, alpha=scale)
    return _like(rows, base), _like(hidden, x)


def low_rank_linear_supports(x: Tensor, *args: Any) -> str | None:
    """Return None, or why the call cannot run in place."""
    return None if x.is_cpu and args[-1] is None else _reason(x, args[-1])


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Any) -> tuple[Tensor, Tensor]:
    """Return the output and the rank-sized product; see `peftk.functional.low_rank_linear`."""
    # Base first: where b is zero, the output keeps every bit of the base layer's.
    y = linear(x, weight, bias)
    return y, _expand_(y, x, Parameters(*parameters))


def _gradients(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    parameters: Parameters,
    need: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, gate, scale, dropout_p, seed = parameters
    rows, dropped = grad, x
    if grad.dim() != 2:
        rows, hidden, dropped = _as_rows(grad), _as_rows(hidden), _as_rows(x)
    if need.a and seed is not None:
        dropped = _dropped_rows(x, dropout_p, seed)
    thin = _thin(rows, a.shape[0])
    # Without a mask the thin product is added onto the large one: it costs less than a fresh buffer of its own.
    onto = weight if seed is None else None
    dx = da = db = dgate = grad.new_empty(0)
    if need.x:
        if onto is not None:
            dx = torch.mm(rows, onto)
        else:
            dx = rows.new_zeros(dropped.shape)
    if thin:
        da, db = a.new_empty(a.shape) if need.a else da, b.new_empty(b.shape) if need.b else db
        dgate = gate.new_empty(gate.shape) if gate is not None and need.gate else dgate
        _fused_backward(
            *(rows.contiguous(), dropped.contiguous(), hidden, a.contiguous(), b.contiguous()),
            *(None if gate is None else _gate_rows(gate), scale, dx, da, db, dgate),
        )
    else:
        # Sums over tokens, and what they are sums of, are never rounded to half precision.
        left, onto_hidden, right = rows, b, dropped
        if rows.dtype in HALF and not narrow(rows):
            left, onto_hidden, right = widened(rows), widened(b), widened(dropped)
        product = wide_product if rows.dtype in HALF else torch.mm
        dhidden = product(left, onto_hidden)
        hidden = hidden if gate is None else widened(hidden)
        if need.b:
            db = product(left.mT, hidden if gate is None else _gated(hidden, gate))
        if scale != 1.0:
            dhidden.mul_(scale)
            db = db.mul_(scale) if need.b else db
        if gate is not None and need.gate:
            dgate = dhidden.to(gate.dtype) * hidden.to(gate.dtype)
            dgate = dgate.sum(0) if gate.dim() == 1 else dgate.view(gate.shape)
        dhidden = dhidden if gate is None else _gated(dhidden, gate)
        if need.a:
            da = product(dhidden.mT, right)
        if need.x:
            dx.addmm_(dhidden.to(dx.dtype), a)
    if need.x:
        if seed is not None:
            _dropout_(dx, dropout_p, seed, dx)
        if weight is not None and onto is None:
            dx.addmm_(rows, weight)
        dx = dx if x.dim() == 2 else _like(dx, x)
    return dx, da, db, dgate


def low_rank_add_backward_supports(grad: Tensor, x: Tensor, hidden: Tensor, *args: Any) -> str | None:
    """Return None, or why the backward pass cannot run in place."""
    return _reason(x, args[5])


def low_rank_add_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, a, b and the gate; an empty tensor for one not needed."""
    return _gradients(grad, x, hidden, None, Parameters(*arguments[:6]), Needs(*arguments[6:]))


def low_rank_linear_backward_supports(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, *args: Any
) -> str | None:
    """Return None, or why the backward pass cannot run in place."""
    return None if x.is_cpu and args[5] is None else _reason(x, args[5])


def low_rank_linear_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, a, b, the gate and the bias; an empty tensor for one not needed."""
    found = _gradients(grad, x, hidden, weight, Parameters(*arguments[:6]), Needs(*arguments[6:10]))
    return *found, _as_rows(grad).sum(0) if arguments[10] else grad.new_empty(0)
