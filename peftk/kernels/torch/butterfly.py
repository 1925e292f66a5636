"""Butterfly products and the scale of channels in plain PyTorch.

Features are numbered by half-blocks of h = b / 2. Stage i joins half-blocks whose numbers differ in bit i: block j of
a chunk of 2^i blocks takes half-blocks j and j + 2^i of that chunk. So the product of stages 0 to i is closed on chunks
of b 2^i features, and each of its entries is a sum over half a block: no permutation is ever formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared.butterfly import multiply, multiply_backward
from .block_diagonal import block_rotate, block_rotate_backward


def _halves(factor: Tensor, inner: int) -> Tensor:
    """View the blocks of a stage as (chunks, 2^i blocks, 2 column halves, b rows, h columns)."""
    size = factor.shape[-1]
    return factor.reshape(-1, inner, size, 2, size // 2).transpose(2, 3)


def _parts(product: Tensor, inner: int) -> Tensor:
    """View the product so far as (chunks, 2^i half-blocks, 2 subchunks, h rows, subchunk)."""
    width = product.shape[-1]
    return product.reshape(-1, 2, inner, width // inner, width).transpose(1, 2)


def products(factors: Tensor) -> list[Tensor]:
    """Return the product of the first stages, for every number of them: (nb / 2^i, b 2^i, b 2^i)."""
    found = [factors[0]]
    half = factors.shape[-1] // 2
    for factor in factors[1:]:
        width = found[-1].shape[-1]
        inner = width // half
        rows = _halves(factor, inner) @ _parts(found[-1], inner)
        rows = rows.reshape(-1, inner, 2, 2, half, width).permute(0, 3, 1, 4, 2, 5)
        found.append(rows.reshape(-1, 2 * width, 2 * width))
    return found


def butterfly_compose(factors: Tensor) -> Tensor:
    """See `peftk.functional.butterfly_compose`."""
    return products(factors)[-1].clone(memory_format=torch.contiguous_format)


def butterfly_compose_backward(grad: Tensor, factors: Tensor) -> Tensor:
    """Return the gradient of `butterfly_compose` in the factors."""
    dfactors = torch.empty(factors.shape, dtype=factors.dtype, device=factors.device)
    half, before = factors.shape[-1] // 2, products(factors[:-1]) if len(factors) > 1 else []
    for stage in range(len(factors) - 1, 0, -1):
        width = before[stage - 1].shape[-1]
        inner = width // half
        rows = grad.reshape(-1, 2, inner, half, 2, width).permute(0, 2, 4, 1, 3, 5)
        rows = rows.reshape(-1, inner, 2, 2 * half, width)
        dfactor = rows @ _parts(before[stage - 1], inner).mT
        dfactors[stage] = dfactor.transpose(2, 3).reshape(factors.shape[1:])
        grad = (_halves(factors[stage], inner).mT @ rows).transpose(1, 2).reshape(-1, width, width)
    dfactors[0] = grad
    return dfactors


def butterfly_multiply(x: Tensor, factors: Tensor) -> Tensor:
    """See `peftk.functional.butterfly_multiply`."""
    return multiply(x, factors, lambda chosen: products(chosen)[-1], block_rotate)[0].contiguous()


def butterfly_multiply_backward(
    grad: Tensor, x: Tensor, factors: Tensor, need_x: bool, need_factors: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `butterfly_multiply` in x and in the factors; an empty tensor for one not needed."""
    return multiply_backward(
        *(grad, x, factors, need_x, need_factors),
        *(lambda chosen: products(chosen)[-1], butterfly_compose_backward, block_rotate, block_rotate_backward),
    )


def _channels(x: Tensor, channels: int, inner: int) -> tuple[Tensor, torch.dtype]:
    """View x as (outer, channels, inner), and name the dtype to compute in."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return x.reshape(x.numel() // max(channels * inner, 1), channels, inner), wide


def scale_channels(x: Tensor, scale: Tensor, bias: Tensor | None, inner: int) -> Tensor:
    """See `peftk.functional.scale_channels`."""
    rows, wide = _channels(x, scale.numel(), inner)
    scale = scale.to(wide)[:, None]
    # In this form a scale of one changes no bit, not even that of a negative zero, to which only another one adds none.
    y = rows * scale
    if bias is not None:
        y = y + torch.where(scale == 1, -0.0, (1 - scale) * bias.to(wide)[:, None])
    return y.to(x.dtype).reshape(x.shape).contiguous()


def scale_channels_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    inner: int,
    need_x: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, in the scale and in the bias; an empty tensor for one not needed."""
    rows, wide = _channels(grad, scale.numel(), inner)
    rows, factor = rows.to(wide), scale.to(wide)
    dx = (rows * factor[:, None]).to(grad.dtype).reshape(grad.shape).contiguous() if need_x else grad.new_empty(0)
    dscale, dbias = scale.new_empty(0), grad.new_empty(0) if bias is None else bias.new_empty(0)
    if need_scale:
        values = _channels(x, scale.numel(), inner)[0].to(wide)
        if bias is not None:
            values = values - bias.to(wide)[:, None]
        dscale = (rows * values).sum((0, 2)).to(scale.dtype)
    if bias is not None and need_bias:
        dbias = ((1 - factor) * rows.sum((0, 2))).to(bias.dtype)
    return dx, dscale, dbias
