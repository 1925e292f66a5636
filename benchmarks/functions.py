"""A public operator at the size of a call, as arms of a comparison: peftk's function, and plain PyTorch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import peftk
from peftk.testing.calls import Call
from peftk.testing.cases import all_cases
from peftk.testing.compare import LIMITS, joined

from . import truth
from .arms import Arm
from .plain import PLAIN

Results = Tensor | tuple[Tensor, ...]

# The naive formulas of the tests.
FORMULAS: dict[str, Callable[..., Tensor]] = {case.operator: case.formula for case in all_cases()}

# Of a frozen layer, and where groups of rows end.
FROZEN = ("weight", "bias", "offsets")


def keywords(call: Call, arguments: tuple) -> dict[str, Any]:
    """Return the arguments of an operator by the names of the public function, without those that have its defaults."""
    names = (argument.name for argument in getattr(torch.ops.peftk, call.forward).default._schema.arguments)
    given = dict(zip(names, arguments, strict=True))
    if call.forward == "cayley":
        # The operator takes the coefficients that a number of terms means.
        given["neumann_terms"] = len(given["polynomial"]) or None
    known = inspect.signature(getattr(peftk.functional, call.forward)).parameters
    return {
        name: value
        for name, value in given.items()
        if name in known and (isinstance(value, Tensor) or value != known[name].default)
    }


class Function:
    """The public function of a forward call, its arguments, and its truth.

    Args:
        call: a call of a forward operator.

    Attributes:
        raw: the arguments of the operator.
        public: the function of `peftk.functional`.
        plain: the same in plain PyTorch.
        trained: the arguments that gradients are taken in: all tensors but those of a frozen layer; none of an
            operator that has no backward pass.
        fixed: the other arguments.
        grad: an incoming gradient for every result.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.public: Callable[..., Results] = getattr(peftk.functional, call.forward)
        self.plain = PLAIN[call.forward]
        self.raw = call.arguments()
        given = keywords(call, self.raw)
        trained = {n: v for n, v in given.items() if isinstance(v, Tensor) and n not in FROZEN}
        self.trained = trained if call.kind.differentiable else {}
        self.fixed = {n: v for n, v in given.items() if n not in self.trained}
        generator = torch.Generator().manual_seed(1)

        def normal(result: Tensor) -> Tensor:
            return torch.randn(result.shape, generator=generator).to(result.dtype)

        results = self.public(**given)
        self.grad = normal(results) if isinstance(results, Tensor) else tuple(map(normal, results))

    @functools.cached_property
    def truth(self) -> dict[str, Tensor]:
        """The results and the gradients in float64, by a dense formula."""
        floating = {n: v.double() for n, v in self.fixed.items() if isinstance(v, Tensor) and v.is_floating_point()}
        fixed = {**self.fixed, **floating}
        formula = functools.partial(FORMULAS[self.call.forward], **fixed)
        # Also where a comparison is made without gradients.
        with torch.enable_grad():
            return truth.differentiate(formula, self.trained, joined(self.grad))

    def arm(self, name: str, run: Callable[..., Results], note: str, backend: str | None = None) -> Arm:
        """Return the arm of a function: forward and backward, on one of peftk's backends if it is named."""
        leaves = {key: value.clone().requires_grad_() for key, value in self.trained.items()}

        def step() -> Results:
            for leaf in leaves.values():
                leaf.grad = None
            results = run(**leaves, **self.fixed)
            if leaves:
                torch.autograd.backward(results, self.grad)
            return results

        def named() -> Results:
            with peftk.use_backend(backend):
                return step()

        chosen = named if backend else step

        def check() -> dict[str, float]:
            results = joined(chosen())
            return truth.errors({"output": results, **{f"d{n}": leaf.grad for n, leaf in leaves.items()}}, self.truth)

        def owned() -> list[Tensor]:
            fixed = [value for value in self.fixed.values() if isinstance(value, Tensor)]
            return [*leaves.values(), *fixed, *((self.grad,) if isinstance(self.grad, Tensor) else self.grad)]

        return Arm(name, chosen, check, LIMITS[self.call.dtype], owned, note)

    def forward_arm(self, name: str, run: Callable[..., Results], note: str) -> Arm:
        """Return the arm of a function without gradients."""
        given = {**self.trained, **self.fixed}

        def check() -> dict[str, float]:
            return truth.errors({"output": joined(run(**given))}, {"output": self.truth["output"]})

        return Arm(name, lambda: run(**given), check, LIMITS[self.call.dtype], note=note)
