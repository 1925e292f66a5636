"""Dropout that keeps a seed for the backward pass, not a mask and not what it has made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as tf

from ...ops import _seed
from ...ops._autograd import apply


class _Dropped(torch.autograd.Function):
    """Zeroes elements of x; which ones depends on the seed alone."""

    @staticmethod
    def forward(x: Tensor, p: float, seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
        return torch.where(keep, x / (1 - p), 0.0)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _x, ctx.p, ctx.seed = inputs

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return _Dropped.forward(grad, ctx.p, ctx.seed), None, None


class _Product(torch.autograd.Function):
    """A product of the dropped x and a small weight; x is saved, and dropped again for the gradient."""

    @staticmethod
    def forward(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, p: float, seed: int) -> Tensor:
        return product(_Dropped.forward(x, p, seed), weight)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.product, x, weight, ctx.p, ctx.seed = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() and any(t.requires_grad for t in (grad, x, weight)):
            raise RuntimeError("double backward is not supported through dropout")
        needed = ctx.needs_input_grad[1:3]
        factors = _Dropped.forward(x, ctx.p, ctx.seed), weight.detach()
        factors = [factor.requires_grad_(need) for factor, need in zip(factors, needed, strict=True)]
        with torch.enable_grad():
            y = ctx.product(*factors)
        found = iter(torch.autograd.grad(y, [factor for factor in factors if factor.requires_grad], grad))
        dx, dweight = (next(found) if need else None for need in needed)
        return None, None if dx is None else _Dropped.forward(dx, ctx.p, ctx.seed), dweight, None, None


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
        return apply(_Dropped, self._x, self._p, self._seed) if self._made is None else self._made

    def product(self, product: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> Tensor:
        """Return ``product(dropped x, weight)``, of which x and the weight are saved; it is computed again backward.

        Args:
            product: A function that is linear in both arguments, and cheap.
            weight: Its second argument.

        Raises:
            RuntimeError: Later, if the result is differentiated twice.
        """
        if self._made is None and torch._C._are_functorch_transforms_active():
            self._made = self.dropped()
        if self._made is not None:
            return product(self._made, weight)
        return apply(_Product, product, self._x, weight, self._p, self._seed)
