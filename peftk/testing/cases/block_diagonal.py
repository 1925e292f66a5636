"""Cases of the block rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Case, Inputs, Rows


def _dense(blocks: Tensor, features: int) -> Tensor:
    size = blocks.shape[-1]
    count = features // size
    return torch.block_diag(*(blocks if len(blocks) == count else blocks.expand(count, size, size)))


def rotate(x: Tensor, blocks: Tensor, transpose: bool = False) -> Tensor:
    """Multiply by the dense block-diagonal matrix."""
    dense = _dense(blocks, x.shape[-1])
    return x @ (dense.mT if transpose else dense)


def rotate_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor:
    """Multiply by the dense block-diagonal matrix, then by the weight."""
    y = x @ _dense(blocks, x.shape[-1]) @ weight.mT
    return y if bias is None else y + bias


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _rotate_case(
    name: str, lead: tuple[Any, ...], count: int, size: int, *, shared: bool = False, transpose: bool = False
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        return {
            "x": _normal(generator, *lead, count * size),
            "blocks": _normal(generator, 1 if shared else count, size, size) / size**0.5,
            "transpose": transpose,
        }

    return Case("block_rotate", name, make, rotate, ("x", "blocks"), ("x",), rows=Rows(("x",)))


def _linear_case(name: str, lead: tuple[Any, ...], count: int, size: int, out: int, *, bias: bool = True) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        features = count * size
        return {
            "x": _normal(generator, *lead, features),
            "weight": _normal(generator, out, features) / features**0.5,
            "bias": _normal(generator, out) if bias else None,
            "blocks": _normal(generator, count, size, size) / size**0.5,
        }

    gradients = ("x", "bias", "blocks") if bias else ("x", "blocks")
    activations = "x", "weight", "bias"
    return Case("block_rotate_linear", name, make, rotate_linear, gradients, activations, rows=Rows(("x",)))


CASES = [
    _rotate_case("one-row-b1", (1,), 3, 1),
    _rotate_case("vector-b2", (), 3, 2),
    _rotate_case("empty-b4", (0,), 2, 4),
    _rotate_case("b3", (5,), 4, 3),
    _rotate_case("b4", (7, 3), 5, 4),
    _rotate_case("b5-transposed", (66,), 3, 5, transpose=True),
    _rotate_case("b8", (65,), 6, 8),
    _rotate_case("b12-shared", (9, 2), 4, 12, shared=True),
    _rotate_case("b16-transposed", (64,), 3, 16, transpose=True),
    _rotate_case("b30", (63,), 2, 30),
    _rotate_case("b32", (130,), 4, 32),
    _rotate_case("b32-shared-transposed", (33,), 3, 32, shared=True, transpose=True),
    _rotate_case("b33", (17,), 2, 33),
    _rotate_case("b64", (70,), 2, 64),
    _rotate_case("b128-one-block", (40,), 1, 128),
    _rotate_case("b256", (31,), 1, 256),
    _rotate_case("many-rows-b4", (1023,), 2, 4),
    _rotate_case("many-blocks-b2", (3,), 97, 2),
    _linear_case("one-row", (1,), 3, 4, 5),
    _linear_case("one-row-no-bias", (1,), 3, 4, 5, bias=False),
    _linear_case("vector", (), 3, 4, 5),
    _linear_case("empty", (0,), 3, 4, 5),
    _linear_case("b3", (7, 3), 5, 3, 11),
    _linear_case("b8-no-bias", (65,), 4, 8, 17, bias=False),
    _linear_case("b32", (130,), 3, 32, 40),
    _linear_case("b64", (33,), 2, 64, 96),
    _linear_case("one-output", (12,), 2, 16, 1),
]

DOCTOR = {
    "block_rotate-b8",
    "block_rotate-b32",
    "block_rotate-b32-shared-transposed",
    "block_rotate_linear-b8-no-bias",
    "block_rotate_linear-b32",
}
