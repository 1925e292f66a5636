"""Which gradients of a Hadamard product's factors are asked for, in the order of the operators."""

from __future__ import annotations

from typing import NamedTuple


class Needs(NamedTuple):
    """Whether the gradient in each factor is needed."""

    w1_a: bool
    w1_b: bool
    w2_a: bool
    w2_b: bool
