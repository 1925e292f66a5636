"""The Kronecker product on the CPU: torch multiplies by the large factor, in place; C++ mixes with the small one.

The weight is written by C++ on the CPU, and by CUDA C++.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ... import _C  # noqa: F401 - importing it registers the operators of peftk_native
from ..shared.kronecker import Needs, w1_first_backward, w2_first
from ._bare import bare
from ._supports import device_reason, supports_activations
from .wide_product import wide_product

# Looked up once: the look-up of an operator by name costs as much as a small kernel.
_mix = torch.ops.peftk_native.kronecker_mix.default
_write = torch.ops.peftk_native.kronecker_weight.default
_write_backward = torch.ops.peftk_native.kronecker_weight_backward.default

few = bare(torch.ops.peftk_native.kronecker_few.default)
"""``few(x, weight, bias, w1, w2, scale, most)`` returns the output of `kronecker_linear` for few rows, in one pass over
the weight; None where operators have to run, as the functions of `few_rows` do.
"""

rows = bare(torch.ops.peftk_native.kronecker_rows.default)
"""``rows(x, w1, w2, scale, out)`` writes the product of few rows, float32 or bfloat16, to a float32 `out`."""

# Stands for a float32 result that is not wanted.
_NONE = torch.empty(0, dtype=torch.float32, device="cpu")


def _rows(x: Tensor, columns: int) -> Tensor:
    """View activations as rows of this many columns."""
    return x.reshape(x.numel() // columns, columns)


def _add_(y: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """Add the product onto a contiguous buffer that nobody else holds."""
    none = x.new_empty(0)
    rows, columns = w2.shape
    if w2_first(w1, w2):
        product = torch.mm(_rows(x, columns), w2.mT)  # (tokens * m, k)
        _mix(none, product, w1, scale, rows, True, False, y, none, _NONE)
        return y
    mixed = x.new_empty(x.numel() // w1.shape[1] * w1.shape[0])
    _mix(none, x.contiguous(), w1, scale, columns, False, False, mixed, none, _NONE)
    _rows(y, rows).addmm_(_rows(mixed, columns), w2.mT)
    return y


def kronecker_add_supports(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float) -> str | None:
    """Return None, or why C++ cannot run the call."""
    if base.dtype is not x.dtype:
        return f"base and x must share a dtype to be accumulated in place; got {base.dtype} and {x.dtype}"
    return supports_activations(x)


def kronecker_add(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.kronecker_add`."""
    return _add_(base.clone(memory_format=torch.contiguous_format), x, w1.contiguous(), w2, scale)


def kronecker_linear_supports(x: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot run the call."""
    return supports_activations(x)


def kronecker_linear(x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.kronecker_linear`."""
    # Base first: where the product is zero, the output keeps every bit of the base layer's.
    return _add_(linear(x, weight, bias).contiguous(), x, w1.contiguous(), w2, scale)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, w1: Tensor, w2: Tensor, scale: float, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_w1, need_w2 = needs
    dx, dw2 = grad.new_empty(0), w2.new_empty(0, dtype=torch.float32)
    dw1 = w1.new_empty(w1.shape if need_w1 else 0, dtype=torch.float32)
    grad, x, w1, none = grad.contiguous(), x.contiguous(), w1.contiguous(), grad.new_empty(0)
    (left, _), (rows, columns) = w1.shape, w2.shape
    by_row = _rows(grad, rows)  # (tokens * l, k)
    if need_x and weight is not None:
        dx = torch.mm(_rows(grad, left * rows), weight)
    if w1_first_backward(w1, w2):
        by_column = _rows(x, columns)  # (tokens * m, n)
        product = torch.mm(by_column, w2.mT) if need_w1 else none
        mixed = x.new_empty((by_column.shape[0], rows) if need_x or need_w2 else 0)
        _mix(grad, product, w1, scale, rows, False, False, none, mixed, dw1)
        if need_x:
            dx = torch.mm(mixed, w2) if weight is None else _rows(dx, columns).addmm_(mixed, w2)
        if need_w2:
            dw2 = wide_product(mixed.mT, by_column)
    else:
        product = torch.mm(by_row, w2) if need_x or need_w1 else none  # (tokens * l, n)
        if need_x and weight is None:
            dx = x.new_empty(x.shape)
        mixed = x.new_empty((by_row.shape[0], columns) if need_w2 else 0)
        _mix(product, x, w1, scale, columns, False, weight is not None, mixed, dx, dw1)
        if need_w2:
            dw2 = wide_product(by_row.mT, _rows(mixed, columns))
    return dx.view(x.shape) if need_x else dx, dw1, dw2


def kronecker_add_backward_supports(grad: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    return supports_activations(grad)


def kronecker_add_backward(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, w1 and w2; an empty tensor for one not needed."""
    return _gradients(grad, x, None, w1, w2, scale, Needs(*needs))


def kronecker_linear_backward_supports(grad: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    return supports_activations(grad)


def kronecker_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    w1: Tensor,
    w2: Tensor,
    scale: float,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in x, w1, w2 and the bias; an empty tensor for one not needed."""
    dbias = _rows(grad, grad.shape[-1]).sum(0) if needs[3] else grad.new_empty(0)
    return *_gradients(grad, x, weight, w1, w2, scale, Needs(*needs[:3])), dbias


CUDA_ROWS = 65_535
"""Most rows of w2 that the CUDA kernels take."""


def _weight_reason(weight: Tensor, w2: Tensor) -> str | None:
    if not weight.is_cuda:
        return supports_activations(weight)
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the CUDA kernels take float32, bfloat16 and float16; got {weight.dtype}"
    if w2.shape[0] > CUDA_ROWS:
        return f"the CUDA kernels take a w2 of up to {CUDA_ROWS} rows; got {w2.shape[0]}"
    return device_reason(weight)


def kronecker_weight_supports(weight: Tensor, w1: Tensor, w2: Tensor, scale: float) -> str | None:
    """Return None, or why C++ cannot write the weight."""
    return _weight_reason(weight, w2)


def kronecker_weight(weight: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.kronecker_weight`."""
    weight = weight.contiguous()
    out = torch.empty_like(weight)
    _write(weight, w1.contiguous(), w2.contiguous(), scale, out)
    return out


def kronecker_weight_backward_supports(grad: Tensor, w1: Tensor, w2: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    return _weight_reason(grad, w2)


def kronecker_weight_backward(
    grad: Tensor, w1: Tensor, w2: Tensor, scale: float, need_w1: bool, need_w2: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients in w1 and w2; an empty tensor for one not needed."""
    dw1 = torch.empty(w1.shape if need_w1 else 0, dtype=torch.float32, device=grad.device)
    dw2 = torch.empty(w2.shape if need_w2 else 0, dtype=torch.float32, device=grad.device)
    if need_w1 or need_w2:
        _write_backward(grad.contiguous(), w1.contiguous(), w2.contiguous(), scale, dw1, dw2)
    return dw1, dw2
