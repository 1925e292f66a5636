"""The low-rank product in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Multiply by the two factors, and by the scale."""
    return scale * linear(linear(x, a), b)


PLAIN = {
    "low_rank_add": lambda base, x, a, b, scale=1.0: base + low_rank(x, a, b, scale),
    "low_rank_linear": lambda x, weight, bias, a, b, scale=1.0: linear(x, weight, bias) + low_rank(x, a, b, scale),
}
