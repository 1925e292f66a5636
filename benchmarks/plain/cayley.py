"""The Cayley transform in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def transform(skew: Tensor, block_size: int, neumann_terms: int | None = None) -> Tensor:
    """Unpack, and solve, or add up the powers that five terms mean."""
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=skew.device)
    upper = skew.new_zeros(len(skew), block_size, block_size)
    upper[:, rows, columns] = skew
    s = upper - upper.mT
    eye = torch.eye(block_size, dtype=s.dtype, device=s.device)
    if neumann_terms is None:
        return torch.linalg.solve(eye + s, eye - s, left=False)
    s2 = s @ s
    return eye + 2 * s + 2 * s2 + 2 * s2 @ s + s2 @ s2


PLAIN = {
    "cayley": transform,
}
