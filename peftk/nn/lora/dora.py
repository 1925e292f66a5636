"""DoRA: the magnitude of every output row of a LoRA layer is a parameter of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Magnitude(nn.Module):
    """The magnitudes of one adapter: `weight` (out,), or (1, out, 1, 1) for a convolution."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return ``magnitude / norms``, (out,), through which no gradient reaches the norms; a zero row is left alone."""
    magnitude = magnitude.view(-1)
    norms = norms.detach().to(magnitude.dtype)
    return magnitude / torch.where(norms == 0, torch.ones_like(norms), norms)
