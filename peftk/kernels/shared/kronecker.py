"""The order in which the two contractions of a Kronecker product cost least."""

from __future__ import annotations

from torch import Tensor


def w2_first(w1: Tensor, w2: Tensor) -> bool:
    """Say whether ``w1 (w2 x)`` takes fewer operations than ``w2 (w1 x)``."""
    (left, middle), (rows, columns) = w1.shape, w2.shape
    return middle * rows * (columns + left) < left * columns * (middle + rows)


def w1_first_backward(w1: Tensor, w2: Tensor) -> bool:
    """Say whether the gradients cost less from ``w1.T grad`` than from ``grad w2``."""
    (left, middle), (rows, columns) = w1.shape, w2.shape
    from_mixed = 3 * middle * rows * columns + 2 * left * middle * rows
    return from_mixed < 2 * left * rows * columns + 3 * left * middle * columns
