"""What a trial is, and the sizes that trials share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ... import functional
from ..compare import joined

Report = dict[str, Any]

TOKENS, FEATURES, OUT, SIZE = 33, 64, 48, 8
"""Rows of x, its last size, that of the output, and the size of a block (or of what divides both others)."""


@dataclass(frozen=True)
class Trial:
    """One operator on small inputs, and its dense formula.

    Attributes:
        operator: the name of the public function.
        variant: tells the trials of one operator apart; empty if there is only one.
        inputs: its tensors by name; all of them are differentiated in, except a weight.
        options: its other arguments.
        formula: the operator on these tensors in plain dense algebra.
    """

    operator: str
    variant: str
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    formula: Callable[..., Tensor]

    def call(self, **inputs: Tensor) -> Tensor:
        """Run the public function; several results become one flat tensor."""
        return joined(getattr(functional, self.operator)(**inputs, **self.options))
