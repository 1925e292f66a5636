"""The Kronecker product in Triton: the small factor is applied inside the product with the large one.

The rows of some tokens, m or l for each, make one tile. The small factor acts on such a tile as a block-diagonal
matrix with a copy of itself for every token, which is a matrix instruction more between the product with w2 and the
store; nothing between the two contractions goes to memory. The order is always w2 first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.shared.kronecker import Needs
from ._launch import unsupported
from .kronecker_products import LARGEST, LARGEST_FLOAT, large_factor_gradient, product
from .kronecker_weights import weight_gradients, write_weight


def _factor_reason(x: Tensor, w1: Tensor, w2: Tensor) -> str | None:
    if reason := unsupported(x):
        return reason
    largest = LARGEST_FLOAT if x.dtype is torch.float32 else LARGEST
    if max(w1.shape) > largest:
        return f"the Triton kernels take a w1 of up to {largest} x {largest} in {x.dtype}; got {tuple(w1.shape)}"
    if w1.dtype is not torch.float32 or w2.dtype is not x.dtype:
        return f"the Triton kernels take w1 in float32 and w2 in the dtype of x; got {w1.dtype} and {w2.dtype}"
    return None


def kronecker_add_supports(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float) -> str | None:
    """Return None, or why Triton cannot run the call."""
    if base.dtype is not x.dtype:
        return f"the Triton kernels take base and x in one dtype; got {base.dtype} and {x.dtype}"
    return _factor_reason(x, w1, w2)


def kronecker_add(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.kronecker_add`."""
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    product(out, base.contiguous(), x.contiguous(), w1.contiguous(), w2, scale)
    return out


def kronecker_linear_supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: float
) -> str | None:
    """Return None, or why Triton cannot run the call."""
    return _factor_reason(x, w1, w2)


def kronecker_linear(x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.kronecker_linear`."""
    # The base layer's own call comes first: where the product is zero, its bits stay.
    y = linear(x, weight, bias).contiguous()
    product(y, y, x.contiguous(), w1.contiguous(), w2, scale)
    return y


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, w1: Tensor, w2: Tensor, scale: float, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_w1, need_w2 = needs
    dx, dw1, dw2 = grad.new_empty(0), w1.new_empty(0), w2.new_empty(0, dtype=torch.float32)
    grad, x, w1 = grad.contiguous(), x.contiguous(), w1.contiguous()
    if x.numel() == 0:
        return (
            torch.zeros_like(x) if need_x else dx,
            torch.zeros_like(w1) if need_w1 else dw1,
            torch.zeros(w2.shape, dtype=torch.float32, device=w2.device) if need_w2 else dw2,
        )
    if need_x or need_w1:
        base = grad @ weight if need_x and weight is not None else None
        if need_x:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if base is None else base
        out = dx if need_x else None
        found = product(out, base, grad, w1, w2, scale, transposed=True, other=x if need_w1 else None)
        # (l, m), as the product has the rows of the gradient.
        dw1 = dw1 if found is None else found
    if need_w2:
        dw2 = large_factor_gradient(grad, x, w1, w2, scale)
    return dx, dw1, dw2


def kronecker_add_backward_supports(grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return _factor_reason(x, w1, w2)


def kronecker_add_backward(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, w1 and w2; an empty tensor for one not needed."""
    return _gradients(grad, x, None, w1, w2, scale, Needs(*needs))


def kronecker_linear_backward_supports(
    grad: Tensor, x: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, *args: object
) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return _factor_reason(x, w1, w2)


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
    dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs[3] else grad.new_empty(0)
    return *_gradients(grad, x, weight, w1, w2, scale, Needs(*needs[:3])), dbias


def kronecker_weight_supports(weight: Tensor, w1: Tensor, w2: Tensor, scale: float) -> str | None:
    """Return None, or why Triton cannot write the weight."""
    return unsupported(weight)


def kronecker_weight(weight: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.kronecker_weight`."""
    return write_weight(weight.contiguous(), w1.contiguous(), w2.contiguous(), scale)


def kronecker_weight_backward_supports(grad: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return unsupported(grad)


def kronecker_weight_backward(
    grad: Tensor, w1: Tensor, w2: Tensor, scale: float, need_w1: bool, need_w2: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients in w1 and w2; an empty tensor for one not needed."""
    return weight_gradients(grad.contiguous(), w1.contiguous(), w2.contiguous(), scale, need_w1, need_w2)
