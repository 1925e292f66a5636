"""Cases of the Hadamard product of two low-rank matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compare import joined
from . import NO_ROWS, Case, Inputs, Rows

_FACTORS = ("w1_a", "w1_b", "w2_a", "w2_b")


def factors(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
    """Multiply every row of one factor with every row of the other, one pair at a time."""
    pairs = [(i, j) for i in range(w1_b.shape[0]) for j in range(w2_b.shape[0])]
    a = torch.stack([w1_b[i] * w2_b[j] for i, j in pairs])
    return joined((a, torch.stack([w1_a[:, i] * w2_a[:, j] for i, j in pairs], dim=1)))


def weight(
    weight: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float | Tensor = 1.0
) -> Tensor:
    """Add up the dense matrices of every rank, one at a time."""
    first = sum((torch.outer(w1_a[:, i], w1_b[i]) for i in range(w1_b.shape[0])), start=weight.new_zeros(()))
    second = sum((torch.outer(w2_a[:, j], w2_b[j]) for j in range(w2_b.shape[0])), start=weight.new_zeros(()))
    return weight + scale * (first * second).view(weight.shape)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _make(generator: torch.Generator, out: int, features: int, r1: int, r2: int) -> Inputs:
    return {
        "w1_a": _normal(generator, out, r1),
        "w1_b": _normal(generator, r1, features) / r1**0.5,
        "w2_a": _normal(generator, out, r2),
        "w2_b": _normal(generator, r2, features) / r2**0.5,
    }


def _khatri_rao_case(name: str, out: int, features: int, r1: int, r2: int | None = None) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        return _make(generator, out, features, r1, r1 if r2 is None else r2)

    return Case("khatri_rao", name, make, factors, _FACTORS, _FACTORS, rows=NO_ROWS)


def _weight_case(
    name: str,
    out: int,
    row: tuple[int, ...],
    r1: int,
    r2: int | None = None,
    *,
    scale: float | list[float] = 1.5,
    frozen: bool = False,
) -> Case:
    features = torch.Size(row).numel()

    def make(generator: torch.Generator) -> Inputs:
        weight = _normal(generator, out, *row)
        four = _make(generator, out, features, r1, r1 if r2 is None else r2)
        if not isinstance(scale, list):
            return {"weight": weight, **four, "scale": scale}
        # One sum for the whole scale: terms of one sign keep it well conditioned in half precision.
        four = {name: factor.abs() for name, factor in four.items()}
        return {"weight": weight, **four, "scale": torch.tensor(scale[0], dtype=torch.float64)}

    def saved(inputs: Inputs) -> int:
        # A scale that is a tensor is multiplied into a factor of its own.
        return 8 * (out * r1 + 1) if isinstance(scale, list) else 0

    gradients: tuple[str, ...] = _FACTORS if frozen else ("weight", *_FACTORS)
    gradients += ("scale",) if isinstance(scale, list) else ()
    # The weight may have more dimensions than the factors, whose rows are its rows, too.
    rows = Rows(("weight", "w1_a", "w2_a"), 1, len(row)) if len(row) == 1 else Rows(("weight",), len(row), len(row))
    return Case("hadamard_weight", name, make, weight, gradients, ("weight",), saved, rows=rows)


CASES = [
    _khatri_rao_case("r1", 1, 1, 1),
    _khatri_rao_case("r2", 3, 4, 2),
    _khatri_rao_case("empty", 0, 4, 2),
    _khatri_rao_case("r8", 40, 33, 8),
    _khatri_rao_case("ranks-3-5", 17, 70, 3, 5),
    _khatri_rao_case("wide", 5, 300, 4),
    _khatri_rao_case("prime-sizes", 101, 103, 7),
    _weight_case("one-element", 1, (1,), 1),
    _weight_case("small", 3, (5,), 2, frozen=True),
    _weight_case("empty", 0, (4,), 2),
    _weight_case("no-columns", 3, (0,), 2),
    _weight_case("r8", 30, (40,), 8, scale=-0.5),
    _weight_case("ranks-3-17", 13, (70,), 3, 17),
    _weight_case("convolution", 9, (4, 3, 2), 4),
    _weight_case("r20", 35, (66,), 20, frozen=True),
    _weight_case("tensor-scale", 6, (7,), 2, scale=[0.75]),
    _weight_case("many-rows", 100, (5,), 2),
]

DOCTOR = {
    "khatri_rao-r8",
    "hadamard_weight-r8",
}
