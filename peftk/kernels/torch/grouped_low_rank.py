"""The grouped low-rank product in plain PyTorch: one group after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..shared.grouped_low_rank import by_group, shrunk, sizes_of
from ..shared.wide import wide, wide_product, widened


def _gated(hidden: Tensor, gate: Tensor | None) -> Tensor:
    return hidden if gate is None else (hidden * gate).to(hidden.dtype)


def grouped_low_rank_add(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, gate: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the sum and the rank-sized product; see `peftk.functional.grouped_low_rank_add`."""
    sizes = sizes_of(offsets, x.shape[0])
    hidden = shrunk(x, a, offsets)
    delta = by_group(linear, _gated(hidden, gate), b, sizes) * scale
    # Rows of no group are those of the base, whatever a gate holds there.
    covered = x.shape[0] - sizes[-1]
    return torch.cat([(base[:covered] + delta[:covered]).to(base.dtype), base[covered:]]), hidden


def grouped_low_rank_add_backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
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
    """Return the gradients in x, a, b and the gate; an empty tensor for one not needed."""
    sizes = sizes_of(offsets, x.shape[0])
    dx = dgate = grad.new_empty(0)
    da = db = grad.new_empty(0, dtype=wide(grad.dtype))
    rows, hidden = widened(grad), widened(hidden)
    gated = by_group(torch.mm, rows, widened(b), sizes) * scale
    if need_gate and gate is not None:
        dgate = gated.to(gate.dtype) * hidden.to(gate.dtype)
    if need_b:
        pairs = zip(rows.split(sizes)[:-1], _gated(hidden, gate).split(sizes)[:-1], strict=True)
        db = torch.stack([left.mT @ right for left, right in pairs]) * scale
    dhidden = _gated(gated, gate)
    if need_a:
        pairs = zip(dhidden.split(sizes)[:-1], x.split(sizes)[:-1], strict=True)
        da = torch.stack([wide_product(left.mT, right) for left, right in pairs])
    if need_x:
        dx = by_group(torch.mm, dhidden, widened(a), sizes).to(x.dtype)
    return dx, da, db, dgate


def grouped_low_rank_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor, gate: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and the rank-sized product; see `peftk.functional.grouped_low_rank_linear`."""
    base = by_group(_cast_product, x, weight.mT, sizes_of(offsets, x.shape[0]))
    return grouped_low_rank_add(base, x, a, b, offsets, gate, scale)


def _cast_product(rows: Tensor, weight: Tensor) -> Tensor:
    return rows @ weight.to(rows.dtype)


def grouped_low_rank_linear_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, a, b and the gate; an empty tensor for one not needed."""
    dx, da, db, dgate = grouped_low_rank_add_backward(grad, x, hidden, *arguments)
    _, _, offsets, _, _, need_x, *_ = arguments
    if need_x:
        dx = dx + by_group(_cast_product, grad, weight, sizes_of(offsets, x.shape[0]))
    return dx, da, db, dgate
