"""The product with a butterfly in several passes over x, made of a backend's own compositions and rotations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_GROUP = 256
"""Largest group of features whose stages are multiplied out; beyond, several passes over x do less."""


def passes(size: int, stages: int) -> list[tuple[int, int]]:
    """Cut the stages into as few passes as keep their groups within `MAX_GROUP`, evenly, the first stages first."""
    most = 1
    while most < stages and size << most <= MAX_GROUP:
        most += 1
    count = -(-stages // most)
    edges = [stages * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def gather(x: Tensor, size: int, first: int, last: int) -> Tensor:
    """Bring the half-blocks that stages first to last - 1 join together: the lower bits of their numbers go up."""
    if first == 0:
        return x
    return x.reshape(-1, 1 << (last - first), 1 << first, size // 2).transpose(1, 2).reshape(x.shape)


def scatter(x: Tensor, size: int, first: int, last: int) -> Tensor:
    """Undo `gather`."""
    if first == 0:
        return x
    return x.reshape(-1, 1 << first, 1 << (last - first), size // 2).transpose(1, 2).reshape(x.shape)


def gather_factors(factors: Tensor, first: int, last: int) -> Tensor:
    """Return stages first to last - 1 as a butterfly of their own, of features that `gather` has brought together."""
    chosen = factors[first:last]
    if first == 0:
        return chosen
    shape = (last - first, -1, 1 << (last - first - 1), 1 << first, *factors.shape[2:])
    return chosen.reshape(shape).transpose(2, 3).reshape(chosen.shape)


def scatter_factors(chosen: Tensor, first: int, last: int) -> Tensor:
    """Undo `gather_factors`."""
    shape = (last - first, -1, 1 << first, 1 << (last - first - 1), *chosen.shape[2:])
    return chosen if first == 0 else chosen.reshape(shape).transpose(2, 3).reshape(chosen.shape)


def multiply(
    x: Tensor, factors: Tensor, compose: Callable[..., Any], rotate: Callable[..., Any], product: bool = True
) -> tuple[Tensor, list[tuple[Any, ...]]]:
    """Multiply x pass by pass, with a backend's own functions; return what `multiply_backward` needs of every pass.

    Without `product` the last rotation, which only the product needs, is left out.
    """
    size, record = factors.shape[-1], []
    for first, last in reversed(passes(size, len(factors))):
        chosen = gather_factors(factors, first, last)
        blocks = compose(chosen) if last - first > 1 else chosen[0]
        gathered = gather(x, size, first, last)
        record.append((first, last, chosen, blocks, gathered))
        if product or first > 0:
            x = scatter(rotate(gathered, blocks, False), size, first, last)
    return x, record


def multiply_backward(
    grad: Tensor,
    x: Tensor,
    factors: Tensor,
    need_x: bool,
    need_factors: bool,
    compose: Callable[..., Any],
    compose_backward: Callable[..., Any],
    rotate: Callable[..., Any],
    rotate_backward: Callable[..., Any],
) -> tuple[Tensor, Tensor]:
    """Run the passes again and then backward, with a backend's own functions."""
    size, dfactors = factors.shape[-1], torch.empty_like(factors) if need_factors else factors.new_empty(0)
    record = multiply(x, factors, compose, rotate, False)[1]
    for at, (first, last, chosen, blocks, gathered) in reversed(list(enumerate(record))):
        grad, dblocks = rotate_backward(
            gather(grad, size, first, last), gathered, blocks, False, need_x or at > 0, need_factors
        )
        grad = scatter(grad, size, first, last) if need_x or at > 0 else grad
        if need_factors:
            dchosen = compose_backward(dblocks, chosen) if last - first > 1 else dblocks[None]
            dfactors[first:last] = scatter_factors(dchosen, first, last)
    return grad, dfactors
