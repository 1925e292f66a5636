"""AdaLoRA: a low-rank update in the form of a singular value decomposition (Zhang et al., arXiv 2303.10512)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .lora import LowRank, few, linear, merged, update

__all__ = ["Triplets", "few", "linear", "low_rank", "merged", "update"]


class Triplets(NamedTuple):
    """The tensors and settings of one adapter on one layer: the update ``scaling / (init_r + 1e-5) * (B * E) A``.

    Attributes:
        a: (r, in), the right singular vectors.
        b: (out, r), the left ones.
        e: (r, 1) or (r,), the singular values; r may be 0.
        scaling: The numerator of the scale.
        init_r: The rank before anything was pruned.
        dropout_p: The probability with which an element of the input is dropped.
    """

    a: Tensor
    b: Tensor
    e: Tensor
    scaling: float
    init_r: int
    dropout_p: float = 0.0


def low_rank(adapter: Triplets) -> LowRank:
    """Return an adapter as the low-rank update that it is, which `linear`, `update` and `merged` take."""
    # PEFT's constant `ranknum` is on the device; its value is known without waiting for it.
    scale = adapter.scaling / (adapter.init_r + 1e-5)
    return LowRank(adapter.a, adapter.b, scale, adapter.e.view(-1), None, adapter.dropout_p)
