"""Cases of the Kronecker product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Case, Inputs, Rows


def _dense(w1: Tensor, w2: Tensor) -> Tensor:
    """Build the dense matrix block by block, each a multiple of w2."""
    return torch.cat([torch.cat([entry * w2 for entry in row], dim=1) for row in w1], dim=0)


def weight(weight: Tensor, w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
    """Add the dense Kronecker product."""
    return weight + scale * _dense(w1, w2)


def add(base: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
    """Multiply by the dense Kronecker product."""
    return base + scale * (x @ _dense(w1, w2).mT)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
    """Multiply by the weight, then add the dense Kronecker product."""
    base = x @ weight.mT
    return add(base if bias is None else base + bias, x, w1, w2, scale)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


_FORMULAS: dict[str, Callable[..., Tensor]] = {
    "kronecker_add": add,
    "kronecker_linear": linear,
    "kronecker_weight": weight,
}
Sizes = tuple[int, int, int, int]


def _case(
    operator: str,
    name: str,
    lead: tuple[Any, ...],
    sizes: Sizes,
    *,
    bias: bool = True,
    scale: float = 2.0,
    positive: bool = False,
) -> Case:
    left, middle, rows, columns = sizes
    features, out = middle * columns, left * rows

    def make(generator: torch.Generator) -> Inputs:
        inputs: Inputs = {"x": _normal(generator, *lead, features)}
        if operator == "kronecker_linear":
            inputs["weight"] = _normal(generator, out, features) / features**0.5
            inputs["bias"] = _normal(generator, out) if bias else None
        elif operator == "kronecker_add":
            inputs = {"base": _normal(generator, *lead, out), **inputs}
        else:
            inputs = {"weight": _normal(generator, out, features) / features**0.5}
        inputs["w1"] = _normal(generator, left, middle) / middle**0.5
        inputs["w2"] = _normal(generator, rows, columns) / columns**0.5
        if positive:
            # Short sums: terms of one sign keep them well conditioned in half precision.
            inputs |= {k: v.abs() for k, v in inputs.items() if isinstance(v, Tensor)}
        return {**inputs, "scale": scale}

    def saved(inputs: Inputs) -> int:
        # The factors in the dtype of the computation, where they have another one.
        return 8 * (left * middle + rows * columns)

    first = {
        "kronecker_add": ("base", "x"),
        "kronecker_linear": ("x", "bias") if bias else ("x",),
        "kronecker_weight": ("weight",),
    }[operator]
    activations = ("base", "x", "weight", "bias")
    # A weight is a sum of its own for every element.
    independent = Rows(tuple(n for n in first if n != "bias"))
    return Case(operator, name, make, _FORMULAS[operator], (*first, "w1", "w2"), activations, saved, rows=independent)


def _both(name: str, *args: Any, **kwargs: Any) -> list[Case]:
    without = {k: v for k, v in kwargs.items() if k != "bias"}
    return [_case("kronecker_linear", name, *args, **kwargs), _case("kronecker_add", name, *args, **without)]


def _weight(name: str, sizes: Sizes, **kwargs: Any) -> Case:
    return _case("kronecker_weight", name, (), sizes, **kwargs)


# Sizes are (l, m, k, n). Where l is far from m, the contractions and the gradients are taken in the other order.
CASES = [
    *_both("one-row", (1,), (2, 3, 4, 5), positive=True),
    _case("kronecker_linear", "one-row-no-bias", (1,), (3, 2, 2, 3), bias=False, positive=True),
    *_both("vector", (), (2, 2, 3, 4), positive=True),
    *_both("empty", (0,), (2, 3, 4, 5)),
    *_both("scalar-w1", (5, 2), (1, 1, 6, 7), scale=0.5),
    *_both("column-w1", (9,), (16, 1, 5, 13), scale=-1.25, bias=False),
    *_both("row-w1", (9,), (1, 12, 11, 3)),
    *_both("scalar-w2", (7,), (5, 9, 1, 1)),
    *_both("f8", (9,), (8, 8, 16, 16), scale=0.5),
    *_both("tall", (6,), (20, 3, 4, 8)),
    *_both("zero-scale", (10,), (2, 2, 3, 2), scale=0.0),
    *_both("prime-sizes", (13,), (3, 5, 7, 13)),
    _weight("scalars", (1, 1, 1, 1), positive=True),
    _weight("small", (2, 3, 4, 5), positive=True),
    _weight("scalar-w1", (1, 1, 6, 7), scale=0.5),
    _weight("row-w1", (1, 12, 5, 3), scale=-1.25),
    _weight("column-w1", (12, 1, 5, 16)),
    _weight("f4", (4, 4, 8, 16), scale=0.5),
    _weight("prime-sizes", (3, 5, 7, 13)),
    _weight("zero-scale", (2, 2, 3, 2), scale=0.0),
]

DOCTOR = {
    "kronecker_add-f8",
    "kronecker_linear-f8",
    "kronecker_weight-f4",
}
