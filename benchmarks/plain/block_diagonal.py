"""Block rotation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply by a block-diagonal matrix, as one batched product."""
    rows = x.view(len(x), -1, blocks.shape[-1]).transpose(0, 1)
    return torch.bmm(rows, blocks).transpose(0, 1).reshape(x.shape)


PLAIN = {
    "block_rotate": rotate,
    "block_rotate_linear": lambda x, weight, bias, blocks: linear(rotate(x, blocks), weight, bias),
}
