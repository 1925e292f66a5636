"""DoRA's norms and output in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from .low_rank import low_rank


def norms(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Form the adapted weight, and take the norms of its rows."""
    return (weight.float() + scale * (b @ a)).norm(dim=1)


def rescaled(base: Tensor, x: Tensor, a: Tensor, b: Tensor, gain: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """Scale what is beside the bias."""
    return (bias + gain * (base - bias + low_rank(x, a, b, scale))).to(base.dtype)


PLAIN = {
    "dora_compose": rescaled,
    "dora_norm": norms,
}
