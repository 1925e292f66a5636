"""What the autograd Functions share: they give way to transforms, and gradients of their gradients are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime import registry


def transformed() -> bool:
    """Whether a compiler or a function transform runs: both differentiate plain formulas better than Functions."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class _Gradients(torch.autograd.Function):
    """A backward pass that is differentiated through its plain formula, which is run again for that."""

    @staticmethod
    def forward(operator: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> Any:
        return operator(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.plain, *args = inputs
        ctx.single = isinstance(output, Tensor)
        ctx.others = [None if isinstance(a, Tensor) else a for a in args]
        ctx.places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(args[i] for i in ctx.places))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[2:]
        tensors = dict(zip(ctx.places, ctx.saved_tensors, strict=True))
        wanted = [i for i in ctx.places if needs[i]]

        def plain(*values: Tensor) -> list[Tensor]:
            args = [tensors.get(i, other) for i, other in enumerate(ctx.others)]
            for i, value in zip(wanted, values, strict=True):
                args[i] = value
            with registry.differentiable():
                found = ctx.plain(*args)
            outputs = (found,) if ctx.single else found
            return [y for y, grad in zip(outputs, grads, strict=True) if grad is not None]

        incoming = [grad for grad in grads if grad is not None]
        pull = vjp(plain, [tensors[i] for i in wanted], torch.is_grad_enabled())[1]
        found = dict(zip(wanted, pull(incoming), strict=True))
        return None, None, *(found.get(i) for i in range(len(needs)))


def vjp(
    function: Callable[..., Sequence[Tensor]], values: Sequence[Tensor], differentiable: bool
) -> tuple[Sequence[Tensor], Callable[[Sequence[Tensor]], Sequence[Tensor | None]]]:
    """Return the results of a function, and what turns gradients in them into gradients in its arguments.

    Args:
        function: A function of `values`.
        values: Where it is differentiated.
        differentiable: Whether the results and the gradients can be differentiated again.
    """
    if differentiable and torch._C._are_functorch_transforms_active():
        found = torch.func.vjp(lambda *v: tuple(function(*v)), *values)
        return found[0], lambda grads: found[1](tuple(grads))
    with torch.enable_grad():
        # An alias keeps the history of a value apart: gradients in the one are not those in the other.
        leaves = []
        for value in values:
            leaves.append(value.view_as(value) if differentiable else value.detach().requires_grad_())
        results = function(*leaves)

    def gradients(grads: Sequence[Tensor]) -> Sequence[Tensor | None]:
        ys, incoming = [], []
        for y, grad in zip(results, grads, strict=True):
            if y.requires_grad:
                ys.append(y)
                incoming.append(grad)
        if not ys:
            return [None] * len(leaves)
        return torch.autograd.grad(ys, leaves, incoming, create_graph=differentiable, allow_unused=True)

    return results, gradients


def run_backward(operator: Callable[..., Any], *args: Any, plain: Callable[..., Any] | None = None) -> Any:
    """Run a backward operator so that its results can be differentiated again, any number of times.

    Args:
        operator: The operator, or a function composed of operators and PyTorch.
        *args: Its arguments.
        plain: The same as a function of what the forward pass was given, differentiable where operators run in plain
            PyTorch. None if `operator` is one: it is not, where an argument is a result of the forward pass.
    """
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return _Gradients.apply(operator, plain or operator, *args)
    return operator(*args)
