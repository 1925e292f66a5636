"""Cases of butterfly products and of the scale of channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import NO_ROWS, Case, Inputs, Rows


def permutation(features: int, size: int, stage: int) -> Tensor:
    """Sort the half-blocks of every chunk of size 2^stage features: those of even number first."""
    if stage == 0:
        return torch.arange(features)
    half, chunk, order = size // 2, size << stage, []
    for start in range(0, features, chunk):
        halves = [list(range(at, at + half)) for at in range(start, start + chunk, half)]
        for part in halves[0::2] + halves[1::2]:
            order += part
    return torch.tensor(order)


def stages(factors: Tensor) -> list[Tensor]:
    """Return every stage as a dense matrix, the first stage first."""
    dense = []
    for stage, blocks in enumerate(factors):
        order = permutation(blocks.shape[0] * blocks.shape[1], blocks.shape[1], stage).to(factors.device)
        dense.append(torch.block_diag(*blocks).index_select(0, order).index_select(1, order))
    return dense


def compose(factors: Tensor) -> Tensor:
    """Multiply dense stages, and cut out the blocks of the diagonal."""
    dense = stages(factors)
    product = dense[0]
    for stage in dense[1:]:
        product = stage @ product
    group = factors.shape[2] << (len(factors) - 1)
    return torch.stack([product[at : at + group, at : at + group] for at in range(0, len(product), group)])


def multiply(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply x by every dense stage, the last stage first."""
    for stage in reversed(stages(factors)):
        x = x @ stage
    return x


def scale(x: Tensor, scale: Tensor, bias: Tensor | None = None, dim: int = -1) -> Tensor:
    """Take the bias away, multiply by a diagonal matrix and put the bias back."""
    rows = x.movedim(dim, -1)
    shifted = rows if bias is None else rows - bias
    shifted = shifted @ torch.diag(scale)
    return (shifted if bias is None else shifted + bias).movedim(-1, dim)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _factors(generator: torch.Generator, stages: int, count: int, size: int) -> Tensor:
    # Near the identity, as rotations are: long products keep their size.
    return torch.eye(size, dtype=torch.float64) + 0.5 / size * _normal(generator, stages, count, size, size)


def _compose_case(stages: int, count: int, size: int) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        return {"factors": _factors(generator, stages, count, size)}

    return Case("butterfly_compose", f"m{stages}-{count}xb{size}", make, compose, ("factors",), (), rows=NO_ROWS)


def _multiply_case(name: str, lead: tuple[Any, ...], stages: int, count: int, size: int) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        return {"x": _normal(generator, *lead, count * size), "factors": _factors(generator, stages, count, size)}

    # Half-precision factors are widened once.
    saved = lambda inputs: 4 * inputs["factors"].numel()  # noqa: E731
    return Case("butterfly_multiply", name, make, multiply, ("x", "factors"), ("x",), saved, rows=Rows(("x",)))


def _scale_case(name: str, shape: tuple[Any, ...], dim: int = -1, bias: bool = True) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        # Numbers of one sign: their sums, of which there may be one only, are well conditioned in half precision.
        inputs: Inputs = {"x": 2 + _normal(generator, *shape).abs(), "scale": 1 + 0.3 * _normal(generator, shape[dim])}
        return inputs | {"bias": _normal(generator, shape[dim]).clamp(-1, 1) if bias else None, "dim": dim}

    wanted = ("x", "scale", "bias") if bias else ("x", "scale")
    # What comes before the channels: the samples of a convolution.
    rows = Rows(("x",), len(shape) - dim % len(shape), len(shape) - dim % len(shape))
    return Case("scale_channels", name, make, scale, wanted, ("x", "bias"), rows=rows)


CASES = [
    _compose_case(1, 2, 3),
    _compose_case(1, 1, 1),
    _compose_case(2, 2, 2),
    _compose_case(3, 4, 6),
    _compose_case(2, 2, 66),
    _compose_case(2, 4, 4),
    _multiply_case("one-row", (1,), 2, 2, 2),
    _multiply_case("vector", (), 2, 2, 4),
    _multiply_case("empty", (0, 2), 2, 2, 2),
    _multiply_case("one-stage", (7,), 1, 3, 5),
    _multiply_case("two-passes", (3,), 3, 4, 66),
    _multiply_case("m3-b4", (5, 9), 3, 4, 4),
    _scale_case("one-row", (1, 5)),
    _scale_case("vector", (7,), bias=False),
    _scale_case("empty", (0, 6)),
    _scale_case("channels-in-the-middle", (3, 5, 2, 3), 1),
    _scale_case("channels-first", (11, 37), 0, bias=False),
    _scale_case("many-rows", (8, 66, 16)),
    _scale_case("wide", (9, 300), bias=False),
    _scale_case("rows", (13, 16)),
]

DOCTOR = {
    "butterfly_compose-m2-4xb4",
    "butterfly_multiply-m3-b4",
    "scale_channels-many-rows",
}
