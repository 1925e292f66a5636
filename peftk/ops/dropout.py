"""Dropout that keeps a seed for the backward pass, not a mask and not what it has made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as tf

from ..runtime import registry
from . import _seed
from ._autograd import run_backward, vjp


class _Dropped(torch.autograd.Function):
    """Zeroes elements of x; which ones depends on the seed alone."""

    @staticmethod
    def forward(x: Tensor, p: float, seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
        return torch.where(keep, x / (1 - p), 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _x, ctx.p, ctx.seed = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Dropped.forward(grad, ctx.p, ctx.seed), None, None


class _Product(torch.autograd.Function):
    """A product of the dropped x and a small weight; x is saved, and dropped again for the gradient."""

    @staticmethod
    def forward(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, p: float, seed: int) -> Tensor:
        return product(_Dropped.forward(x, p, seed), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.product, x, weight, ctx.p, ctx.seed = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[1:3]
        found = run_backward(_gradients, ctx.product, ctx.p, ctx.seed, needs, grad, *ctx.saved_tensors)
        return None, *found, None, None


def _gradients(
    product: Callable[..., Any], p: float, seed: int, needs: tuple[Any, ...], grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Any, ...]:
    factors = [_Dropped.forward(x, p, seed), weight]
    wanted = [factor for factor, need in zip(factors, needs, strict=True) if need]

    def function(*chosen: Tensor) -> list[Tensor]:
        rest = iter(chosen)
        return [product(*(next(rest) if need else factor for factor, need in zip(factors, needs, strict=True)))]

    found = iter(vjp(function, wanted, registry.is_differentiable())[1]([grad]))
    dx, dweight = (next(found) if need else None for need in needs)
    return None if dx is None else _Dropped.forward(dx, p, seed), dweight


class Dropout:
    """One draw of which elements of an input are dropped, for all that read it.

    Args:
        x: The input.
        p: The probability with which an element is dropped.

    Raises:
        RuntimeError: While a CUDA graph is captured; see `draw_seed`.
    """

    def __init__(self, x: Tensor, p: float) -> None:
        self._x, self._p = x, p
        self._made: Tensor | None = None
        if p == 0:
            self._made = x
        elif torch.compiler.is_compiling():
            # A compiler regenerates its random numbers itself.
            self._made = tf.dropout(x, p)
        else:
            self._seed = int(_seed.draw_seed(x.device))

    def dropped(self) -> Tensor:
        """Return x with elements dropped; what reads it must not save it."""
        return registry.apply(_Dropped, self._x, self._p, self._seed) if self._made is None else self._made

    def product(self, product: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> Tensor:
        """Return ``product(dropped x, weight)``, of which x and the weight are saved; it is computed again backward.

        Args:
            product: A function that is linear in both arguments, and cheap.
            weight: Its second argument.
        """
        if self._made is None and torch._C._are_functorch_transforms_active():
            self._made = self.dropped()
        if self._made is not None:
            return product(self._made, weight)
        return registry.apply(_Product, product, self._x, weight, self._p, self._seed)


class Drawn:
    """An input that somebody else has dropped, with what `Dropout` offers.

    Args:
        dropped: The input with zeros where elements were dropped, and the others scaled up.
    """

    def __init__(self, dropped: Tensor) -> None:
        self._dropped = dropped

    def dropped(self) -> Tensor:
        """Return the dropped input."""
        return self._dropped

    def product(self, product: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> Tensor:
        """Return ``product(dropped input, weight)``."""
        return product(self._dropped, weight)
