"""DoRA: the magnitude of every output row of a LoRA layer is a parameter of its own."""

from __future__ import annotations

import torch
from torch import nn


class Magnitude(nn.Module):
    """The magnitudes of one adapter: `weight` (out,), (1, out, 1 ...) for a convolution, or (1, in) for inputs."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
