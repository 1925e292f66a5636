"""What the backends share of the Kronecker product: which gradients are asked for, and the order that costs least."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Needs(NamedTuple):
    """Which gradients are asked for, in the order of the operators."""

    x: bool
    w1: bool
    w2: bool


def w2_first(w1: Tensor, w2: Tensor) -> bool:
    """Say whether ``w1 (w2 x)`` takes fewer operations than ``w2 (w1 x)``."""
    (left, middle), (rows, columns) = w1.shape, w2.shape
    return middle * rows * (columns + left) < left * columns * (middle + rows)


def w1_first_backward(w1: Tensor, w2: Tensor) -> bool:
    """Say whether the gradients cost less from ``w1.T grad`` than from ``grad w2``."""
    (left, middle), (rows, columns) = w1.shape, w2.shape
    from_mixed = 3 * middle * rows * columns + 2 * left * middle * rows
    return from_mixed < 2 * left * rows * columns + 3 * left * middle * columns
