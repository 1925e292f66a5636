"""What the autograd Functions share: they give way to transforms, and are differentiated once only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def transformed() -> bool:
    """Whether a compiler or a function transform runs: both differentiate plain formulas better than Functions."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class _OnceDifferentiable(torch.autograd.Function):
    """A node of the graph that raises when a gradient reaches it.

    ``torch.autograd.function.once_differentiable`` looks at the incoming gradients only: where just a saved
    tensor requires grad it drops terms silently. ``torch.func.grad`` runs every backward pass in grad mode, so
    refusing outright would refuse first derivatives too.
    """

    @staticmethod
    def forward(operator: Callable[..., Any], name: str, *args: Any) -> Any:
        return operator(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        raise RuntimeError(f"{ctx.name}: double backward is not supported; got a gradient for its backward pass")


def run_backward(name: str, operator: Callable[..., Any], *args: Any) -> Any:
    """Run the backward operator of the public function ``name``, or of what a name with a blank describes.

    Raises:
        RuntimeError: later, if the result is differentiated again.
    """
    if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
        return _OnceDifferentiable.apply(operator, name if " " in name else f"peftk.functional.{name}", *args)
    return operator(*args)
