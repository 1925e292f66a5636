"""The Kronecker product in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..shared.kronecker import Needs, w1_first_backward, w2_first
from ..shared.wide import wide, widened


def as_matrices(x: Tensor, count: int, size: int) -> Tensor:
    """View activations as one matrix for every token: (tokens, count, size)."""
    return x.reshape(x.numel() // (count * size), count, size)


def _applied(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    x = as_matrices(x, w1.shape[1], w2.shape[1])
    w1 = w1.to(x.dtype)
    product = torch.matmul(w1, linear(x, w2)) if w2_first(w1, w2) else linear(torch.matmul(w1, x), w2)
    return product.reshape(x.shape[0], w1.shape[0] * w2.shape[0])


def kronecker_add(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.kronecker_add`."""
    return (base + _applied(x, w1, w2).view(base.shape) * scale).to(base.dtype).contiguous()


def kronecker_linear(x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.kronecker_linear`."""
    return kronecker_add(linear(x, weight, bias), x, w1, w2, scale)


def kronecker_add_backward(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, w1 and w2; an empty tensor for one not needed."""
    need = Needs(*needs)
    (left, middle), (rows, columns) = w1.shape, w2.shape
    dx, dw1, dw2 = grad.new_empty(0), w1.new_empty(0), w2.new_empty(0, dtype=wide(w2.dtype))
    # Sums over tokens, and what they are sums of, are never rounded to half precision.
    g, matrices = widened(as_matrices(grad, left, rows)), widened(as_matrices(x, middle, columns))
    dtype, w2 = x.dtype, widened(w2)
    exact = w1.to(g.dtype)
    if w1_first_backward(w1, w2):
        mixed = torch.matmul(exact.mT, g) * scale  # (tokens, m, k)
        if need.x:
            dx = (mixed @ w2).to(dtype).view(x.shape)
        if need.w1:
            dw1 = torch.einsum("tlk,tmk->lm", g, linear(matrices, w2)) * scale
        if need.w2:
            dw2 = torch.einsum("tmk,tmn->kn", mixed, matrices)
    else:
        product = g @ w2  # (tokens, l, n)
        if need.x:
            dx = (torch.matmul(exact.mT, product) * scale).to(dtype).reshape(x.shape)
        if need.w1:
            dw1 = torch.einsum("tln,tmn->lm", product, matrices) * scale
        if need.w2:
            dw2 = torch.einsum("tlk,tln->kn", g, torch.matmul(exact, matrices) * scale)
    return dx, dw1.to(w1.dtype), dw2


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
    dx, dw1, dw2 = kronecker_add_backward(grad, x, w1, w2, scale, *needs[:3])
    if needs[0]:
        dx = grad @ weight + dx
    dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs[3] else grad.new_empty(0)
    return dx, dw1, dw2, dbias


def kronecker_weight(weight: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.kronecker_weight`."""
    # torch.kron takes no factor of every layout.
    product = (w1[:, None, :, None] * w2[None, :, None, :]).reshape(weight.shape)
    return (weight + product * scale).to(weight.dtype).contiguous()


def kronecker_weight_backward(
    grad: Tensor, w1: Tensor, w2: Tensor, scale: float, need_w1: bool, need_w2: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients in w1 and w2; an empty tensor for one not needed."""
    (left, middle), (rows, columns) = w1.shape, w2.shape
    blocks = grad.reshape(left, rows, middle, columns).to(w1.dtype)
    dw1 = torch.einsum("lkmn,kn->lm", blocks, w2) * scale if need_w1 else w1.new_empty(0)
    dw2 = torch.einsum("lkmn,lm->kn", blocks, w1) * scale if need_w2 else w2.new_empty(0)
    return dw1, dw2
