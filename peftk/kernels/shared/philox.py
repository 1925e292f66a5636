"""Philox4x32-10 in plain PyTorch: the same random bits as every other backend.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def dropout_threshold(p: float) -> int:
    """Return the integer below which the upper 24 bits of a random number mean "dropped"."""
    return math.ceil(p * 2**24)


def philox(seed: int, count: int, device: torch.device) -> Tensor:
    """Return ``count`` 32-bit random integers as int64; number i depends on (seed, i) alone."""
    # Products of 32-bit numbers wrap in int64, which leaves all 64 bits right; the masks drop the sign.
    index = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    c0, c1, c2, c3 = index & _LOW, index >> 32, torch.zeros_like(index), torch.zeros_like(index)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (right >> 32 & _LOW) ^ c1 ^ k0, right & _LOW, (left >> 32 & _LOW) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=1).flatten()[:count]


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return x with dropped elements zero and the others divided by ``1 - p``."""
    bits = philox(int(seed), x.numel(), x.device)
    keep = (bits >> 8 >= dropout_threshold(p)).view(x.shape)
    return torch.where(keep, x / (1.0 - p), 0.0)
