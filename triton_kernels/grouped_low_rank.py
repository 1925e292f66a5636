"""The grouped low-rank product on a GPU.

Nothing on the host reads the offsets: `grouped_low_rank_products` says how the kernels find their rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.shared.grouped_low_rank import grouped_product
from . import _launch
from .grouped_low_rank_products import MAX_GROUPS, expand, factor_gradient, shrink
from .low_rank_gradients import hidden_gradient


def _by_rows(x: Tensor) -> Tensor:
    """Return a matrix of rows of adjacent elements."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _reason(x: Tensor, a: Tensor, b: Tensor, gate: Tensor | None) -> str | None:
    if reason := _launch.unsupported(x):
        return reason
    if a.dtype is not x.dtype or b.dtype is not x.dtype:
        return f"the Triton kernels take a and b in the dtype of x, {x.dtype}; got {a.dtype} and {b.dtype}"
    if gate is not None and gate.dtype is not torch.float32:
        return f"the Triton kernels take a float32 gate; got {gate.dtype}"
    if a.shape[0] > MAX_GROUPS:
        return f"the Triton kernels take up to {MAX_GROUPS} groups; got {a.shape[0]}"
    return None


def grouped_low_rank_add_supports(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, gate: Tensor | None, *args: object
) -> str | None:
    """Return None, or why the kernels cannot run the call."""
    if base.dtype not in _launch.DTYPES:
        return f"the Triton kernels take a base of float32, float16 or bfloat16; got {base.dtype}"
    return _reason(x, a, b, gate)


def grouped_low_rank_add(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, gate: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the sum and the rank-sized product; see `peftk.functional.grouped_low_rank_add`."""
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    return _added(out, _by_rows(base), x, a, b, offsets, gate, scale)


def _added(
    out: Tensor,
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    gate: Tensor | None,
    scale: float,
    *,
    zeros: bool = False,
) -> tuple[Tensor, Tensor]:
    """Write the sum, whose buffer may be the base's: every program reads the tile that it writes."""
    x, offsets = _by_rows(x), offsets.contiguous()
    hidden = torch.empty(x.shape[0], a.shape[1], dtype=x.dtype, device=x.device)
    shrink(hidden, x, a, (a.stride(0), a.stride(1), a.stride(2)), offsets)
    strides = b.stride(0), b.stride(2), b.stride(1)
    return expand(out, base, hidden, b, strides, offsets, gate, scale, zeros=zeros), hidden


def grouped_low_rank_linear_supports(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor, gate: Tensor | None, *args: object
) -> str | None:
    """Return None, or why the kernels cannot run the call."""
    return _reason(x, a, b, gate)


def grouped_low_rank_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor, gate: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and the rank-sized product; see `peftk.functional.grouped_low_rank_linear`."""
    out = grouped_product(x, weight.mT, offsets, zeros=False)
    return _added(out, out, x, a, b, offsets, gate, scale, zeros=True)


def grouped_low_rank_add_backward_supports(
    grad: Tensor, x: Tensor, hidden: Tensor, a: Tensor, b: Tensor, offsets: Tensor, gate: Tensor | None, *args: object
) -> str | None:
    """Return None, or why the kernels cannot run the backward pass."""
    if grad.dtype is not x.dtype or hidden.dtype is not x.dtype:
        return f"the Triton kernels take grad and hidden in the dtype of x, {x.dtype}; got {grad.dtype}, {hidden.dtype}"
    return _reason(x, a, b, gate)


def grouped_low_rank_add_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, a, b and the gate; an empty tensor for one not needed."""
    return _gradients(grad, x, hidden, None, *arguments)


def grouped_low_rank_linear_backward_supports(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, *args: Any
) -> str | None:
    """Return None, or why the kernels cannot run the backward pass."""
    return grouped_low_rank_add_backward_supports(grad, x, hidden, *args)


def grouped_low_rank_linear_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, a, b and the gate; an empty tensor for one not needed."""
    return _gradients(grad, x, hidden, weight, *arguments)


def _gradients(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    gate: Tensor | None,
    scale: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_gate = need_gate and gate is not None
    dx = da = db = dgate = grad.new_empty(0)
    grad, x, hidden, offsets = _by_rows(grad), _by_rows(x), _by_rows(hidden), offsets.contiguous()
    if need_b:
        db = factor_gradient(hidden, grad, offsets, gate, scale, rank_first=False)
    if not (need_x or need_a or need_gate):
        return dx, da, db, dgate
    sums = torch.empty(1, x.shape[0], a.shape[1], dtype=torch.float32, device=x.device)
    shrink(sums[0], grad, b, (b.stride(0), b.stride(2), b.stride(1)), offsets)
    dhidden, found = hidden_gradient(sums, hidden, gate, scale, need_gate)
    dgate = dgate if found is None else found
    if need_x:
        onto = None if weight is None else grouped_product(grad, weight, offsets, zeros=False)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if onto is None else onto
        rounded = dhidden.to(a.dtype)
        expand(dx, onto, rounded, a, (a.stride(0), a.stride(1), a.stride(2)), offsets, None, 1.0, zeros=True)
    if need_a:
        da = factor_gradient(dhidden, x, offsets, None, 1.0, rank_first=True)
    return dx, da, db, dgate
