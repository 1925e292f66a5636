"""DoRA as LyCORIS has it: magnitudes of outputs or of inputs, and gradients that pass through the norms.

``W' = (W + dW) * m / ||W + dW||`` with a norm for every output, or for every input channel (Liu et al., arXiv
2402.09353, whose norms are constants to the gradient: `dora`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as tf

from .. import functional as F
from ..ops.conv import Convolution, convolve_with
from . import lora_conv
from ._base_layer import plain_tensors
from .lora import LowRank


class Magnitudes(NamedTuple):
    """The magnitudes of one adapter on one layer.

    Attributes:
        values: (out, 1, ...) or (1, in, 1, ...), with as many dimensions as the weight.
        of_outputs: Whether there is one for every output, and not for every input channel.
        strength: How much of the change acts; 1 for all of it.
    """

    values: Tensor
    of_outputs: bool = True
    strength: float = 1.0


def rescaled(weight: Tensor, magnitudes: Magnitudes) -> Tensor:
    """Return an adapted weight, (out, in) or (out, in, *kernel), with the magnitudes in it."""
    dims = [d for d in range(weight.dim()) if d != (0 if magnitudes.of_outputs else 1)]
    norms = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
    return weight * _gain(norms, magnitudes.values, magnitudes.strength)


def _gain(norms: Tensor, values: Tensor, strength: float) -> Tensor:
    # The same number keeps LyCORIS from dividing by zero.
    gain = values.to(norms.dtype) / (norms + torch.finfo(norms.dtype).eps)
    return gain if strength == 1 else strength * (gain - 1) + 1


def low_rank_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the norms of the rows of ``W + scale * B A``, (out,), from products of rank size: no update is made."""
    cross = (tf.linear(weight, a) * b).sum(1)  # <W_i, (B A)_i>
    own = (torch.mm(b, torch.mm(a, a.mT)) * b).sum(1)  # |(B A)_i|^2
    squares = weight.square().sum(1) + 2 * scale * cross + scale**2 * own
    # Rounding may leave a row of zeros below zero, and a root has no gradient there.
    return torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt() * (squares > 0)


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    magnitudes: Magnitudes,
) -> Tensor:
    """Return the output of a linear layer with ``W + scale * B A`` and a magnitude for every output.

    Args:
        x: (..., in).
        weight: (out, in); frozen.
        bias: (out,) or None.
        a: (r, in).
        b: (out, r).
        scale: The factor.
        magnitudes: Those of the outputs.
    """
    gain = _gain(low_rank_norms(weight, a, b, scale), magnitudes.values.flatten(), magnitudes.strength)
    return F.scale_channels(F.low_rank_linear(x, weight, bias, a, b, scale), gain, bias)


def low_rank_conv(base: Convolution, x: Tensor, a: Tensor, b: Tensor, scale: float, magnitudes: Magnitudes) -> Tensor:
    """Return the output of a convolution without groups with ``W + scale * B A`` and a magnitude for every output.

    Args:
        base: An nn.Conv1d, nn.Conv2d or nn.Conv3d; frozen.
        x: (batch, in, *size) or (in, *size).
        a: (r, in, *kernel).
        b: (out, r, 1, ...).
        scale: The factor.
        magnitudes: Those of the outputs.
    """
    y = lora_conv.conv(base, x, [LowRank(a, b, scale)])
    norms = low_rank_norms(base.weight.flatten(1), a.flatten(1), b.flatten(1), scale)
    return lora_conv.rescaled(base, y, _gain(norms, magnitudes.values.flatten(), magnitudes.strength))


def written_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    write: Callable[..., Tensor],
    values: tuple[Tensor, ...],
    magnitudes: Magnitudes,
) -> Tensor:
    """Return the output of a linear layer with the weight ``write(weight, *values)`` and magnitudes in it."""
    return tf.linear(x, rescaled(write(weight, *values), magnitudes), bias)


def written_conv(
    base: Convolution,
    x: Tensor,
    write: Callable[..., Tensor],
    values: tuple[Tensor, ...],
    magnitudes: Magnitudes,
) -> Tensor:
    """Return the output of a convolution with the weight ``write(weight, *values)`` and magnitudes in it."""

    def derive(weight: Tensor, magnitude: Tensor, *values: Tensor) -> Tensor:
        changed = write(weight, *values)
        return rescaled(changed, magnitudes._replace(values=magnitude))

    return convolve_with(derive, base, x, magnitudes.values, *values, plain=plain_tensors(base, x))
