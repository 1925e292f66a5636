"""Cases of the circular convolution and of the circulant weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Case, Inputs, Rows


def dense(kernel: Tensor) -> Tensor:
    """Build the matrix of circulant blocks row by row: each row of a block is the one above, rolled to the right."""
    return torch.cat(
        [
            torch.cat([torch.stack([first.roll(p) for p in range(kernel.shape[-1])]) for first in line], dim=1)
            for line in kernel
        ]
    )


def conv(x: Tensor, kernel: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Multiply by the dense matrix."""
    return scale * (x @ dense(kernel).mT)


def conv_add(base: Tensor, x: Tensor, kernel: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Multiply by the dense matrix and add."""
    return base + conv(x, kernel, scale)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Multiply by the weight and by the dense matrix."""
    y = x @ weight.mT + conv(x, kernel, scale)
    return y if bias is None else y + bias


def weight(weight: Tensor, kernel: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Add the dense matrix."""
    return weight + scale * dense(kernel)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "circular_conv": conv,
    "circular_conv_add": conv_add,
    "circulant_linear": linear,
    "circulant_weight": weight,
}


def _case(
    operator: str,
    name: str,
    lead: tuple[Any, ...],
    out: int,
    blocks: int,
    size: int,
    *,
    bias: bool = True,
    scale: float | list[float] = 1.0,
) -> Case:
    """Make a case of (out * size) x (blocks * size); a scale in a list is a tensor."""
    features, out_features = blocks * size, out * size

    def make(generator: torch.Generator) -> Inputs:
        inputs: Inputs = {}
        if operator == "circular_conv_add":
            inputs["base"] = _normal(generator, *lead, out_features)
        if operator != "circulant_weight":
            inputs["x"] = _normal(generator, *lead, features)
        if operator.startswith("circulant"):
            inputs["weight"] = _normal(generator, out_features, features) / features**0.5
        if operator == "circulant_linear":
            inputs["bias"] = _normal(generator, out_features) if bias else None
        inputs["kernel"] = _normal(generator, out, blocks, size) / features**0.5
        if isinstance(scale, list):
            # The gradient of the scale is one long sum: terms of one sign keep it well conditioned in half precision.
            inputs = {k: v.abs() if v is not None else None for k, v in inputs.items()}
        inputs["scale"] = torch.tensor(scale[0], dtype=torch.float64) if isinstance(scale, list) else scale
        return inputs

    first = {
        "circular_conv": ("x",),
        "circular_conv_add": ("base", "x"),
        "circulant_linear": ("x", "bias") if bias else ("x",),
        "circulant_weight": ("weight",),
    }[operator]

    def saved(inputs: Inputs) -> int:
        # The product of the kernel and a scale that is a tensor, and the scale.
        return 8 * (out * blocks * size + 1) if isinstance(scale, list) else 0

    optional = ("scale",) if isinstance(scale, list) else ()
    gradients, activations = (*first, "kernel", *optional), ("base", "x", "weight", "bias")
    # A weight is a sum of its own for every element.
    rows = Rows(tuple(n for n in first if n != "bias"))
    return Case(operator, name, make, FORMULAS[operator], gradients, activations, saved, rows=rows)


# The sizes let every way of `kernels/shared/circulant.py` be taken: dense, by frequencies, merged. Blocks of 64
# are transformed fast in C++, in groups of eight; the numbers of blocks leave a part of one.
CASES = [
    _case("circular_conv", "one-row-b1", (1,), 2, 3, 1),
    _case("circular_conv", "vector-b2", (), 1, 3, 2),
    _case("circular_conv", "empty-b4", (0,), 3, 2, 4),
    _case("circular_conv", "b3", (5, 2), 2, 3, 3, scale=-0.5),
    _case("circular_conv", "b17", (5,), 2, 1, 17),
    _case("circular_conv", "b32-tensor-scale", (3,), 2, 1, 32, scale=[0.75]),
    _case("circular_conv", "b48-many-rows", (67,), 1, 2, 48),
    _case("circular_conv", "b8-many-blocks", (3,), 9, 5, 8),
    _case("circular_conv_add", "b64-blocks", (5,), 3, 2, 64, scale=0.5),
    _case("circular_conv_add", "one-row-b2", (1,), 3, 2, 2),
    _case("circular_conv_add", "vector-b1", (), 3, 2, 1),
    _case("circular_conv_add", "empty-b3", (0, 2), 3, 2, 3),
    _case("circular_conv_add", "b5", (7, 3), 2, 4, 5, scale=2.0),
    _case("circular_conv_add", "b16", (3,), 3, 2, 16, scale=1 / 32),
    _case("circular_conv_add", "b34", (2,), 1, 2, 34),
    _case("circulant_linear", "one-row-b2", (1,), 2, 3, 2),
    _case("circulant_linear", "one-row-b32-no-bias", (1,), 2, 1, 32, bias=False),
    _case("circulant_linear", "vector-b4", (), 3, 2, 4),
    _case("circulant_linear", "empty-b5", (0,), 2, 2, 5),
    _case("circulant_linear", "b7-no-bias", (3, 2), 3, 2, 7, bias=False, scale=-1.5),
    _case("circulant_linear", "b20-tensor-scale", (2,), 2, 1, 20, scale=[-0.5]),
    _case("circulant_linear", "b32", (12,), 1, 2, 32, scale=0.25),
    _case("circulant_linear", "b8", (12,), 3, 4, 8),
    _case("circulant_linear", "b64-blocks", (3,), 3, 2, 64, scale=-0.5),
    _case("circulant_weight", "b1", (), 3, 5, 1),
    _case("circulant_weight", "one-block-b6", (), 1, 1, 6),
    _case("circulant_weight", "b3", (), 4, 2, 3, scale=-0.5),
    _case("circulant_weight", "b16", (), 2, 3, 16, scale=1 / 48),
    _case("circulant_weight", "b19", (), 2, 2, 19),
    _case("circulant_weight", "b64-tensor-scale", (), 1, 2, 64, scale=[0.5]),
]

DOCTOR = {
    "circular_conv-b48-many-rows",
    "circular_conv_add-b16",
    "circulant_linear-b32",
    "circulant_weight-b16",
}
