"""The cases of every operator: inputs, a naive dense formula in float64, and what may be saved for backward.

A formula here shares nothing with the kernels: it builds the dense matrix that the operator stands for, and autograd
differentiates it, so that an identity which a kernel exploits cannot check itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ... import functional
from ..compare import joined

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Which rows of a call are independent: none of them changes another row of the result or of a gradient.

    Attributes:
        arguments: the arguments whose rows are those of the result; none where the operator has no such rows.
        last: how many of their last dimensions make a row.
        result: how many of the result's do.
    """

    arguments: tuple[str, ...]
    last: int = 1
    result: int = 1


NO_ROWS = Rows(())
"""What the cases of an operator say whose every result depends on all of its arguments."""


@dataclass(frozen=True)
class Case:
    """One call of a public function.

    Attributes:
        operator: the name of the function in `peftk.functional`.
        name: identifies the case among those of the operator.
        make: returns the arguments by name: float64 tensors from a generator, and plain values.
        formula: the dense reference on float64 tensors.
        gradients: the arguments to differentiate in.
        activations: the arguments that take the activation dtype; other tensors may stay float32.
        saved: the largest number of bytes that may be kept for backward beyond the inputs, from the inputs.
        rows: which rows are independent; every case says so.
        doctor: whether the doctor runs it; the file of a family names those in `DOCTOR`.
    """

    operator: str
    name: str
    make: Callable[[torch.Generator], Inputs]
    formula: Callable[..., Tensor]
    gradients: tuple[str, ...]
    activations: tuple[str, ...]
    saved: Callable[[Inputs], int] = field(default=lambda inputs: 0)
    rows: Rows = field(kw_only=True)
    doctor: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}"

    def function(self, **inputs: Any) -> Tensor:
        """Call the public function; a result of several tensors becomes one flat tensor, as the formula's does."""
        return joined(getattr(functional, self.operator)(**inputs))

    def inputs(self, seed: int = 0) -> Inputs:
        """Return the arguments in float64; equal seeds give equal bits."""
        return self.make(torch.Generator().manual_seed(seed))

    def cast(self, inputs: Inputs, dtype: torch.dtype, parameters: torch.dtype | None = None) -> Inputs:
        """Return the arguments with activations in one dtype and the other tensors in another (or the same)."""
        cast: Inputs = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.to(dtype if name in self.activations else (parameters or dtype))
            cast[name] = value
        return cast


def all_cases() -> list[Case]:
    """Return the cases of every family."""
    from ... import ops

    found = []
    for name in ops.__all__:
        module = importlib.import_module(f"{__name__}.{name}")
        found += [replace(case, doctor=str(case) in module.DOCTOR) for case in module.CASES]
    return found
