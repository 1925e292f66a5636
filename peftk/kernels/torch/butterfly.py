"""Butterfly products and the scale of channels in plain PyTorch.

Features are numbered by half-blocks of h = b / 2. Stage i joins half-blocks whose numbers differ in bit i: block j of
a chunk of 2^i blocks takes half-blocks j and j + 2^i of that chunk. So the product of stages 0 to i is closed on chunks
of b 2^i features, and each of its entries is a sum over half a block: no permutation is ever formed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from .block_diagonal import block_rotate, block_rotate_backward

MAX_GROUP = 256
"""Largest group of features whose stages are multiplied out; beyond, several passes over x do less."""


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


def passes(size: int, stages: int) -> list[tuple[int, int]]:
    """Cut the stages into as few passes as keep their groups within `MAX_GROUP`, evenly, the first stages first."""
    most = 1
    while most < stages and size << most <= MAX_GROUP:
        most += 1
    count = -(-stages // most)
    edges = [stages * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def _gather(x: Tensor, size: int, first: int, last: int) -> Tensor:
    """Bring the half-blocks that stages first to last - 1 join together: the lower bits of their numbers go up."""
    if first == 0:
        return x
    return x.reshape(-1, 1 << (last - first), 1 << first, size // 2).transpose(1, 2).reshape(x.shape)


def _scatter(x: Tensor, size: int, first: int, last: int) -> Tensor:
    """Undo `_gather`."""
    if first == 0:
        return x
    return x.reshape(-1, 1 << first, 1 << (last - first), size // 2).transpose(1, 2).reshape(x.shape)


def _gather_factors(factors: Tensor, first: int, last: int) -> Tensor:
    chosen = factors[first:last]
    if first == 0:
        return chosen
    shape = (last - first, -1, 1 << (last - first - 1), 1 << first, *factors.shape[2:])
    return chosen.reshape(shape).transpose(2, 3).reshape(chosen.shape)


def _scatter_factors(chosen: Tensor, first: int, last: int) -> Tensor:
    shape = (last - first, -1, 1 << first, 1 << (last - first - 1), *chosen.shape[2:])
    return chosen if first == 0 else chosen.reshape(shape).transpose(2, 3).reshape(chosen.shape)


def multiply(
    x: Tensor, factors: Tensor, compose: Callable, rotate: Callable, product: bool = True
) -> tuple[Tensor, list[tuple]]:
    """Multiply x pass by pass, with a backend's own functions; return what `multiply_backward` needs of every pass.

    Without `product` the last rotation, which only the product needs, is left out.
    """
    size, record = factors.shape[-1], []
    for first, last in reversed(passes(size, len(factors))):
        chosen = _gather_factors(factors, first, last)
        blocks = compose(chosen) if last - first > 1 else chosen[0]
        gathered = _gather(x, size, first, last)
        record.append((first, last, chosen, blocks, gathered))
        if product or first > 0:
            x = _scatter(rotate(gathered, blocks, False), size, first, last)
    return x, record


def multiply_backward(
    grad: Tensor,
    x: Tensor,
    factors: Tensor,
    need_x: bool,
    need_factors: bool,
    compose: Callable,
    compose_backward: Callable,
    rotate: Callable,
    rotate_backward: Callable,
) -> tuple[Tensor, Tensor]:
    """Run the passes again and then backward, with a backend's own functions."""
    size, dfactors = factors.shape[-1], torch.empty_like(factors) if need_factors else factors.new_empty(0)
    record = multiply(x, factors, compose, rotate, False)[1]
    for at, (first, last, chosen, blocks, gathered) in reversed(list(enumerate(record))):
        grad, dblocks = rotate_backward(
            _gather(grad, size, first, last), gathered, blocks, False, need_x or at > 0, need_factors
        )
        grad = _scatter(grad, size, first, last) if need_x or at > 0 else grad
        if need_factors:
            dchosen = compose_backward(dblocks, chosen) if last - first > 1 else dblocks[None]
            dfactors[first:last] = _scatter_factors(dchosen, first, last)
    return grad, dfactors


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
    if need_bias:
        dbias = ((1 - factor) * rows.sum((0, 2))).to(bias.dtype)
    return dx, dscale, dbias
