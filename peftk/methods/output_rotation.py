"""OFT and BOFT on the output side: the rows of a frozen weight are mixed by rotations, ``W' = diag(s) R^T W``.

That is what LyCORIS and kohya's scripts mean by OFT (Qiu et al., arXiv 2306.07280) and BOFT (Liu et al., arXiv
2311.06243). The output of the layer is rotated, but its bias is not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..kernels.shared.wide import wide
from ..ops.bias import add_bias
from ..ops.butterfly import multiply_transposed
from ..ops.conv import Convolution, channels_last, convolve_with
from ._base_layer import NONE, call, plain_tensors


class Turn(NamedTuple):
    """The tensors of one adapter on one layer.

    Attributes:
        blocks: (blocks, b, b), of which y becomes ``y diag(blocks)``; or the stages of a butterfly, (m, blocks, b, b),
            of which it becomes ``y R^T`` with R as in `peftk.functional.butterfly_compose`.
        scale: The factor of every output, of `out` elements, or None.
    """

    blocks: Tensor
    scale: Tensor | None = None


def rotations(square: Tensor, bound: float = 0.0) -> Tensor:
    """Return ``(I + Q)(I - Q)^-1`` with ``Q = B - B^T``, for every block of `square`, (..., b, b).

    Args:
        square: B, whose skew-symmetric part counts.
        bound: The largest norm of all Q together; what is beyond is scaled to it. 0 for none.
    """
    skew = square - square.mT
    if bound > 0:
        norm = torch.linalg.vector_norm(skew) + 1e-8
        skew = skew * torch.where(norm > bound, bound / norm, torch.ones_like(norm))
    size = square.shape[-1]
    # The operator takes the skew-symmetric part of a square matrix, and its transform has the other sign.
    return F.cayley(-skew.reshape(-1, size, size), size).view(square.shape)


def interleaved(stages: Tensor) -> Tensor:
    """Turn the stages of LyCORIS, (m, blocks, b, b), into those of a butterfly, or back.

    In its blocks the features of two half-blocks take turns; here one half-block follows the other.
    """
    size = stages.shape[-1]
    order = torch.arange(size, device=stages.device).view(-1, 2).T.flatten()
    return stages[..., order, :][..., order]


def weakened(blocks: Tensor, strength: float) -> Tensor:
    """Return ``I + strength * (R - I)`` for every block."""
    if strength == 1:
        return blocks
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return eye + strength * (blocks - eye)


def rotated(y: Tensor, turn: Turn) -> Tensor:
    """Return rows, (..., out), that are rotated and scaled."""
    y = F.block_rotate(y, turn.blocks) if turn.blocks.dim() == 3 else multiply_transposed(y, turn.blocks)
    return y if turn.scale is None else F.scale_channels(y, turn.scale.view(-1))


def linear(
    base: nn.Module, x: Tensor, turns: Sequence[Turn], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NONE
) -> Tensor:
    """Return the output of a linear layer whose weight is rotated by one adapter after the other.

    Args:
        base: An nn.Linear, GPT-2's Conv1D, or a layer that is derived from nn.Linear and quantised; frozen.
        x: (..., in).
        turns: The adapters, the first one next to the weight.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    y, bias = call(base, x, *args, **kwargs), getattr(base, "bias", None)
    for turn in turns:
        y = about_bias(y, bias, turn)
    return y


def about_bias(y: Tensor, bias: Tensor | None, turn: Turn) -> Tensor:
    """Rotate the output of a linear layer, (..., out), but for the bias that is in it."""
    y = rotated(y, turn)
    if bias is None:
        return y
    with torch.autocast(bias.device.type, enabled=False):
        # In float32 at least: what it differs by is small, and its gradient a sum over all rows.
        whole = bias.to(wide(bias.dtype))
        change = whole - rotated(whole, turn)
    return add_bias(y, change)


def conv(
    base: Convolution, x: Tensor, turns: Sequence[Turn], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NONE
) -> Tensor:
    """Return the output of a convolution whose filters are mixed by rotations.

    Without groups that is to mix its output channels.

    Args:
        base: An nn.Conv1d, nn.Conv2d or nn.Conv3d; frozen.
        x: (batch, in, *size) or (in, *size).
        turns: The adapters, the first one next to the weight.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    if base.groups > 1:
        # There the filters of an output see other channels than those of the output that they are mixed into.
        values = [t for turn in turns for t in (turn.blocks, turn.scale) if t is not None]
        write = functools.partial(_written, [turn.scale is not None for turn in turns])
        plain = plain_tensors(base, x, args, kwargs)
        return convolve_with(write, base, x, *values, plain=plain, args=args, kwargs=kwargs)
    y = base(x, *args, **kwargs)
    channels = -len(base.kernel_size) - 1
    last = y.dim() > len(base.kernel_size) + 1 and channels_last(y)
    rows = y.movedim(channels, -1)
    for turn in turns:
        rows = about_bias(rows, base.bias, turn)
    y = rows.movedim(-1, channels)
    return y if last else y.contiguous()


def _written(scales: list[bool], weight: Tensor, *values: Tensor) -> Tensor:
    rest = iter(values)
    for has_scale in scales:
        weight = merged(weight, Turn(next(rest), next(rest) if has_scale else None))
    return weight


def merged(weight: Tensor, turn: Turn) -> Tensor:
    """Return a weight, (out, in) or (out, in, *kernel), with one adapter in it."""
    return rotated(weight.flatten(1).mT, turn).mT.reshape(weight.shape)


def rotation(turn: Turn, out: int) -> Tensor:
    """Return the dense matrix, (out, out), by which the outputs are multiplied as rows."""
    return rotated(torch.eye(out, dtype=turn.blocks.dtype, device=turn.blocks.device), turn)
