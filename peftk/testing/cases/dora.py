"""Cases of DoRA's norms and of its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Case, Inputs, Rows


def norm(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Take the norms of the rows of the dense adapted weight."""
    return (weight + scale * (b @ a)).square().sum(1).sqrt()


def decomposed(weight: Tensor, magnitude: Tensor, detached: bool = True, of_inputs: bool = False) -> Tensor:
    """Give the rows of an adapted weight, (out, ...), these norms, or what reads one input: (..., in, ...).

    With `detached` no gradient goes through its own norms.
    """
    if of_inputs:
        return decomposed(weight.transpose(0, 1), magnitude, detached).transpose(0, 1)
    rows = weight.flatten(1)
    norms = (rows.detach() if detached else rows).square().sum(1).sqrt()
    return ((magnitude.flatten() / norms)[:, None] * rows).view(weight.shape)


def compose(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gain: Tensor,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Take the bias away, add the dense update's product, multiply by a diagonal matrix and put the bias back."""
    product = x @ (scale * b @ a).mT
    y = (base + product if bias is None else base - bias + product) @ torch.diag(gain)
    return y if bias is None else y + bias


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _scale(scale: float | list[float]) -> float | Tensor:
    return torch.tensor(scale[0], dtype=torch.float64) if isinstance(scale, list) else scale


def _norm_case(
    name: str, out: int, features: int, rank: int, scale: float | list[float] = 0.5, transposed: bool = False
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        weight = _normal(generator, features, out).mT if transposed else _normal(generator, out, features)
        a, b = _normal(generator, rank, features), _normal(generator, out, rank) / rank**0.5
        return {"weight": weight, "a": a, "b": b, "scale": _scale(scale)}

    return Case("dora_norm", name, make, norm, (), ("weight",), rows=Rows(("weight", "b"), 1, 0))


def _compose_case(
    name: str,
    lead: tuple[Any, ...],
    features: int,
    out: int,
    rank: int,
    *,
    bias: bool = True,
    scale: float | list[float] = 2.0,
    positive: bool = False,
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        inputs: Inputs = {
            "base": 2 + _normal(generator, *lead, out).abs(),
            "x": _normal(generator, *lead, features),
            "a": _normal(generator, rank, features) / features**0.5,
            "b": _normal(generator, out, rank) / rank**0.5,
            "gain": 1 + 0.3 * _normal(generator, out).clamp(-2, 2),
            "bias": _normal(generator, out).clamp(-1, 1) if bias else None,
            "scale": _scale(scale),
        }
        if positive:
            # One short sum, or one for the whole scale: terms of one sign keep it well conditioned in half precision.
            inputs |= {k: inputs[k].abs() for k in ("x", "a", "b")}
        return inputs

    def saved(inputs: Inputs) -> int:
        # The rank-sized product; the rounded factors and the widened gain; b times a scale that is a tensor.
        x, width = inputs["x"], inputs["x"].element_size()
        return width * (x.shape[:-1].numel() * rank + (features + out) * rank) + 4 * out * (rank + 1)

    optional = (*(("bias",) if bias else ()), *(("scale",) if isinstance(scale, list) else ()))
    wanted = "base", "x", "a", "b", "gain", *optional
    rows = Rows(("base", "x"))
    return Case("dora_compose", name, make, compose, wanted, ("base", "x", "bias"), saved, rows=rows)


CASES = [
    _norm_case("one-row-r1", 1, 3, 1),
    _norm_case("one-column", 5, 1, 2),
    _norm_case("empty", 0, 4, 2),
    _norm_case("tensor-scale", 7, 12, 3, [-1.25]),
    _norm_case("rank-above-sizes", 5, 4, 9),
    _norm_case("two-rank-tiles", 9, 20, 70),
    _norm_case("transposed", 70, 14, 4, transposed=True),
    _norm_case("several-tiles", 35, 130, 16),
    _compose_case("one-row-r1", (1,), 3, 5, 1, positive=True),
    _compose_case("vector", (), 6, 5, 2),
    _compose_case("empty", (0, 3), 6, 5, 2),
    _compose_case("no-bias", (7, 3), 12, 10, 4, bias=False, scale=-0.5),
    _compose_case("tensor-scale", (10,), 6, 4, 2, scale=[0.75], positive=True),
    _compose_case("thin", (66,), 20, 17, 16),
    _compose_case("several-tiles", (13,), 24, 70, 5),
    _compose_case("r4", (5, 7), 12, 11, 4, scale=0.5),
]

DOCTOR = {
    "dora_norm-two-rank-tiles",
    "dora_compose-several-tiles",
}
