"""The Hadamard product of two low-rank matrices in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def khatri_rao(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply every row of one factor with every row of the other."""
    return (w1_b[:, None] * w2_b[None]).flatten(0, 1), (w1_a[:, :, None] * w2_a[:, None]).flatten(1)


PLAIN = {
    "hadamard_weight": lambda weight, w1_a, w1_b, w2_a, w2_b, scale=1.0: weight + scale * (w1_a @ w1_b) * (w2_a @ w2_b),
    "khatri_rao": khatri_rao,
}
