"""What belongs together in the arguments of the low-rank operators, whose schemas name each of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Parameters(NamedTuple):
    """One adapter, in the order of the operators.

    Attributes:
        a: (rank, in_features).
        b: (out_features, rank).
        gate: None, (rank,) or (..., rank).
        scale: the factor of the product.
        dropout_p: the probability with which an element of x is dropped.
        seed: what decides which; None without dropout.
    """

    a: Tensor
    b: Tensor
    gate: Tensor | None
    scale: float
    dropout_p: float
    seed: Tensor | None


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    a: bool
    b: bool
    gate: bool
