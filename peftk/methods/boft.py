"""BOFT: a butterfly of block rotations, and a factor for every output (Liu et al., arXiv 2311.06243)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..ops._few_rows import rotated_few, rows_of_one_pass
from ..ops.conv import convolve_with
from ..ops.kept import Kept
from ._base_layer import NONE, Few, call, plain_tensors, unobserved

COMPOSED_GROUP = 256
"""Largest group of features that is rotated by composed blocks; beyond, x passes the factors in turn."""


class Butterfly(NamedTuple):
    """The tensors of one adapter on one layer.

    Attributes:
        factors: (m, blocks, b, b), orthogonal blocks as `rotations` makes them.
        scale: The factor of every output, of `out` elements.
        blocks: What `composed` returns for them, if it is there already.
    """

    factors: Tensor
    scale: Tensor
    blocks: Tensor | None = None

    @property
    def group(self) -> int:
        """How many features one block of the product of all factors mixes."""
        return self.factors.shape[-1] << (len(self.factors) - 1)


def rotations(square: Tensor, kept: Tensor | None = None) -> Tensor:
    """Turn square matrices Q, (m, blocks, b, b), into ``(I - S)(I + S)^-1`` with ``S = (Q - Q^T) / 2``.

    Args:
        square: The parameters.
        kept: (m * blocks,), which blocks rotate in this pass; the others are the identity. None for all of them.
    """
    count, blocks, size, _ = square.shape
    # Under torch.jit.trace sizes are tensors.
    factors = F.cayley(square.flatten(0, 1), int(size)).view(square.shape)
    if kept is None:
        return factors
    eye = torch.eye(size, device=factors.device, dtype=factors.dtype)
    return torch.where(kept.to(factors.device).view(count, blocks, 1, 1), factors, eye)


def resting(square: Tensor, scale: Tensor, kept: Kept) -> Butterfly:
    """Return an adapter in a pass in which all blocks rotate; what is made of its parameters is kept.

    Args:
        square: As in `rotations`.
        scale: The factor of every output, of `out` elements.
        kept: Where it stays between calls that record nothing.
    """

    def make() -> tuple[Tensor, Tensor | None]:
        one = Butterfly(rotations(square), scale)
        return one.factors, composed(one) if one.group <= COMPOSED_GROUP else None

    factors, blocks = kept.get((square,), make)
    return Butterfly(factors, scale, blocks)


def composed(adapter: Butterfly) -> Tensor:
    """Return the blocks of the product of all factors, (blocks, group, group)."""
    if adapter.blocks is not None:
        return adapter.blocks
    factors = adapter.factors
    return factors[0] if len(factors) == 1 else F.butterfly_compose(factors)


def linear(
    base: Any,
    x: Tensor,
    adapters: Sequence[Butterfly],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of a linear layer with adapters: ``y = s * (x R W^T) + bias``.

    Args:
        base: An nn.Linear, GPT-2's Conv1D, or a layer that is derived from nn.Linear and quantised; frozen.
        x: (..., in).
        adapters: The last one rotates first.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    bias = base.bias
    plain = None
    if len(adapters) == 1 and adapters[0].group <= COMPOSED_GROUP:
        plain = plain_tensors(base, x, args, kwargs)
    if plain is not None:
        blocks = composed(adapters[0])
        if not base.training and unobserved():
            y = rotated_few(x, *plain, blocks, adapters[0].scale)
            if y is not None:
                return y
        y = F.block_rotate_linear(x, *plain, blocks)
    else:
        for adapter in reversed(adapters):
            if adapter.group <= COMPOSED_GROUP:
                x = F.block_rotate(x, composed(adapter))
            else:
                x = F.butterfly_multiply(x, adapter.factors)
        y = call(base, x, *args, **kwargs)
    return F.scale_channels(y, _scale(adapters), bias)


def few(weight: Tensor, bias: Tensor | None, square: Tensor, scale: Tensor, kept: Kept | None = None) -> Few | None:
    """Return how a plain linear layer with one adapter runs few rows, or None if operators always do.

    Args:
        weight: The weight of the layer, (out, in).
        bias: Its bias, (out,), or None.
        square: As in `rotations`.
        scale: The factor of every output, of `out` elements.
        kept: Where what is made of `square` is kept; None for a place of its own.
    """
    if square.shape[-1] << (len(square) - 1) > COMPOSED_GROUP:
        return None
    place = Kept() if kept is None else kept

    def run(x: Tensor) -> Tensor | None:
        # Usually nothing has changed, which the call that reads the weight finds out by itself.
        held = place.held(None)
        if held is not None:
            bits, (_, blocks) = held
            y = rotated_few(x, weight, bias, blocks, scale, (square,), bits)
            if y is not None:
                return y
        return rotated_few(x, weight, bias, composed(resting(square, scale, place)), scale)

    return Few(run, rows_of_one_pass(weight.dtype))


def conv2d(
    base: nn.Conv2d,
    x: Tensor,
    adapters: Sequence[Butterfly],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of a convolution without groups with rotated filters: ``W'[o] = s[o] * R W[o]``.

    Args:
        base: An nn.Conv2d; frozen.
        x: (batch, in, height, width) or (in, height, width).
        adapters: The first one rotates first, over in * height * width of the kernel.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    values = [*(composed(adapter) for adapter in adapters), _scale(adapters)]
    plain = plain_tensors(base, x, args, kwargs)
    return convolve_with(_written, base, x, *values, plain=plain, args=args, kwargs=kwargs)


def rotation(adapter: Butterfly) -> Tensor:
    """Return the dense rotation, (in, in)."""
    return torch.block_diag(*composed(adapter))


def merged(weight: Tensor, adapter: Butterfly) -> Tensor:
    """Return a weight, (out, in) or (out, in, height, width), with one adapter in it; a bias stays as it is."""
    return _written(weight, composed(adapter), adapter.scale.to(weight.dtype).view(-1))


def _scale(adapters: Sequence[Butterfly]) -> Tensor:
    scale = adapters[0].scale
    for adapter in adapters[1:]:
        scale = scale * adapter.scale
    return scale.view(-1)


def _written(weight: Tensor, *values: Tensor) -> Tensor:
    """Rotate the rows of a weight by the blocks of every adapter, the first one first, and scale them."""
    *rotated, scale = values
    rows = weight.flatten(1)
    for blocks in rotated:
        rows = F.block_rotate(rows, blocks, transpose=True)
    return F.scale_channels(rows, scale, dim=0).view(weight.shape)
