"""DoRA's norms and its output in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..shared.dora import compose_backward
from .butterfly import scale_channels_backward
from .low_rank import low_rank_add_backward

_PIECE = 1 << 20
"""Elements of a half-precision weight that are widened at a time."""


def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.dora_norm`."""
    pieces: tuple[Tensor, ...] = (weight,)
    if weight.dtype is not b.dtype:
        pieces = weight.split(max(1, _PIECE // max(weight.shape[1], 1)))
    norms, products = [], []
    for piece in pieces:
        wide = piece.to(b.dtype)
        norms.append(torch.linalg.vector_norm(wide, dim=1))
        products.append(wide @ a.mT)
    own, cross = torch.cat(norms), torch.cat(products)
    # ||W||^2 + 2 s <B, W A^T> + s^2 <B (A A^T), B>, row by row.
    update = 2 * scale * (b * cross).sum(1) + scale**2 * (b @ (a @ a.mT) * b).sum(1)
    # The root of a square is the number itself, so that an update of zero changes no bit.
    return (own * own + update).clamp_min(0).sqrt()


def dora_compose(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, gain: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and the rank-sized product ``x @ a.T``; see `peftk.functional.dora_compose`."""
    hidden = linear(x, a)
    y = (base.to(gain.dtype) + linear(hidden, b).to(gain.dtype) * scale) * gain
    if bias is not None:
        y = y + (1 - gain) * bias.to(gain.dtype)
    return y.to(base.dtype).contiguous(), hidden


def dora_compose_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients in base, x, a, b, the gain and the bias; an empty tensor for one not needed."""
    return compose_backward(scale_channels_backward, low_rank_add_backward, *args)
