"""The grouped low-rank product on the CPU: C++ that splits the rows among threads, whatever group they belong to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _C  # noqa: F401 - importing it registers the operators of peftk_native
from ..shared.grouped_low_rank import grouped_product, sizes_of
from ._supports import supports_activations

_forward = torch.ops.peftk_native.grouped_low_rank.default
_backward = torch.ops.peftk_native.grouped_low_rank_backward.default


def _operands(a: Tensor, b: Tensor, offsets: Tensor, gate: Tensor | None) -> tuple[Any, ...]:
    """Return factors, offsets and gate as C++ reads them."""
    gate = None if gate is None else gate.contiguous()
    return a.float().contiguous(), b.float().contiguous(), offsets.long().contiguous(), gate


def grouped_low_rank_add_supports(base: Tensor, x: Tensor, *args: Any) -> str | None:
    """Return None, or why the C++ kernels cannot run the call."""
    if base.dtype is not x.dtype:
        return f"the C++ kernels take base and x of one dtype; got {base.dtype} and {x.dtype}"
    return supports_activations(x)


def grouped_low_rank_add(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, gate: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the sum and the rank-sized product; see `peftk.functional.grouped_low_rank_add`."""
    sizes_of(offsets, x.shape[0])
    out, hidden = base.new_empty(base.shape), x.new_empty(x.shape[0], a.shape[1])
    operands = _operands(a, b, offsets, gate)
    _forward(base.contiguous(), x.contiguous(), *operands, scale, out, hidden)
    return out, hidden


def grouped_low_rank_add_backward_supports(grad: Tensor, x: Tensor, *args: Any) -> str | None:
    """Return None, or why the C++ kernels cannot run the backward pass."""
    return grouped_low_rank_add_supports(grad, x)


def grouped_low_rank_add_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, a, b and the gate; an empty tensor for one not needed."""
    _, _, offsets, _, _, need_x, *_ = arguments
    sizes_of(offsets, x.shape[0])
    return _gradients(grad, x, hidden, x.new_empty(x.shape if need_x else 0), False, *arguments)


def _gradients(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    dx: Tensor,
    add: bool,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    gate: Tensor | None,
    scale: float,
    _need_x: bool,
    need_a: bool,
    need_b: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill `dx`, or add to it where `add`, and return it with the others."""
    da = x.new_empty(a.shape if need_a else 0, dtype=torch.float32)
    db = x.new_empty(b.shape if need_b else 0, dtype=torch.float32)
    dgate = x.new_empty(0) if gate is None or not need_gate else gate.new_empty(gate.shape)
    operands = _operands(a, b, offsets, gate)
    rows = grad.contiguous(), x.contiguous(), hidden.contiguous()
    _backward(*rows, *operands, scale, add, dx, da, db, dgate)
    return dx, da, db, dgate


def grouped_low_rank_linear_supports(x: Tensor, *args: Any) -> str | None:
    """Return None, or why the C++ kernels cannot run the call."""
    return supports_activations(x)


def grouped_low_rank_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor, gate: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and the rank-sized product; see `peftk.functional.grouped_low_rank_linear`."""
    out, hidden = grouped_product(x, weight.mT, offsets), x.new_empty(x.shape[0], a.shape[1])
    _forward(out, x.contiguous(), *_operands(a, b, offsets, gate), scale, out, hidden)
    return out, hidden


def grouped_low_rank_linear_backward_supports(grad: Tensor, x: Tensor, *args: Any) -> str | None:
    """Return None, or why the C++ kernels cannot run the backward pass."""
    return grouped_low_rank_add_supports(grad, x)


def grouped_low_rank_linear_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, a, b and the gate; an empty tensor for one not needed."""
    _, _, offsets, _, _, need_x, *_ = arguments
    if need_x:
        return _gradients(grad, x, hidden, grouped_product(grad, weight, offsets), True, *arguments)
    return grouped_low_rank_add_backward(grad, x, hidden, *arguments)
