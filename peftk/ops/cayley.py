"""The Cayley transform: orthogonal blocks from skew-symmetric ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime import registry
from ..runtime.timings import power_bucket
from ._autograd import run_backward
from ._checks import check_tensor

__all__ = ["cayley"]

MAX_TERMS = 64


def _prepare(skew: Tensor, block_size: int, *, neumann_terms: int | None = None) -> tuple[Any, ...]:
    check_tensor("skew", skew)
    for name, value in (("block_size", block_size), ("neumann_terms", neumann_terms)):
        if (not isinstance(value, int) and not (name == "neumann_terms" and value is None)) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an integer; got {type(value).__name__}")
    if block_size < 1:
        raise ValueError(f"block_size: expected a positive integer; got {block_size}")
    if neumann_terms is not None and not 1 <= neumann_terms <= MAX_TERMS:
        raise ValueError(f"neumann_terms: expected None or an integer from 1 to {MAX_TERMS}; got {neumann_terms}")
    triangle = block_size * (block_size - 1) // 2
    if skew.shape[1:] not in ((triangle,), (block_size, block_size)):
        raise ValueError(
            f"skew: expected shape (nb, b * (b - 1) / 2) = (nb, {triangle}) or (nb, b, b) = "
            f"(nb, {block_size}, {block_size}) for block_size {block_size}; got {tuple(skew.shape)}"
        )
    if skew.dtype in (torch.float16, torch.bfloat16):
        skew = skew.float()
    # The coefficients that a number of terms means in Hugging Face PEFT, the constant first.
    if neumann_terms is None:
        polynomial = []
    elif neumann_terms <= 2:
        polynomial = [1.0, 2.0][:neumann_terms]
    else:
        polynomial = [1.0, *[2.0] * (max(neumann_terms, 4) - 2), 1.0]
    return skew, block_size, polynomial


def _flops(skew: torch.Size, block_size: int, polynomial: list[float], *_args: object, **_kwargs: object) -> int:
    products = max(len(polynomial) - 2, 0) if polynomial else 4 / 3
    return int(2 * products * skew[0] * block_size**3)


def _backward_flops(
    grad: torch.Size, _skew: object, blocks: torch.Size, polynomial: list[float], *_args: object, **_kwargs: object
) -> int:
    products = 3 * max(len(polynomial) - 2, 0) if polynomial else 2
    return 2 * products * blocks[0] * blocks[1] ** 3


def _bucket(count: int, size: int, polynomial: list[float]) -> tuple[Any, ...]:
    return (*power_bucket(count, size), bool(polynomial))


_forward = registry.define(
    "cayley",
    "cayley(Tensor skew, int block_size, float[] polynomial) -> Tensor",
    fake=lambda skew, block_size, polynomial: skew.new_empty(skew.shape[0], block_size, block_size),
    flops=_flops,
    bucket=lambda skew, block_size, polynomial: _bucket(skew.shape[0], block_size, polynomial),
    prepare=_prepare,
)

_backward = registry.define(
    "cayley",
    "cayley_backward(Tensor grad, Tensor skew, Tensor blocks, float[] polynomial) -> Tensor",
    fake=lambda grad, skew, blocks, polynomial: skew.new_empty(skew.shape),
    flops=_backward_flops,
    bucket=lambda grad, skew, blocks, polynomial: _bucket(blocks.shape[0], blocks.shape[1], polynomial),
)


def _plain(grad: Tensor, skew: Tensor, blocks: Tensor, polynomial: list[float]) -> Any:
    return _backward(grad, skew, _forward(skew, blocks.shape[-1], polynomial), polynomial)


class Cayley(torch.autograd.Function):
    """Autograd for `cayley`."""

    @staticmethod
    def forward(skew: Tensor, block_size: int, polynomial: list[float]) -> Tensor:
        """Run the operator."""
        return _forward(skew, block_size, polynomial)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the result, which makes the exact backward pass two products instead of a second solve."""
        skew, _, ctx.polynomial = inputs
        ctx.save_for_backward(skew, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Run the backward operator."""
        skew, blocks = ctx.saved_tensors
        return run_backward(_backward, grad, skew, blocks, ctx.polynomial, plain=_plain), None, None


def cayley(skew: Tensor, block_size: int, *, neumann_terms: int | None = None) -> Tensor:
    """Turn skew-symmetric matrices S into orthogonal blocks by the Cayley transform, exactly or by a Neumann series.

    They are given by their upper triangles, or as the skew-symmetric part ``(Q - Q.T) / 2`` of any square ones. Exact:
    ``(I - S) @ inv(I + S)``. With ``neumann_terms`` n: ``I + 2 S + ... + 2 S^(d-1) + S^d`` of degree d = n - 1
    (n = 3 means 3 as well; n = 1 is I, n = 2 is I + 2 S), which approximates ``(I + S) @ inv(I - S)``, the
    *inverse* of the exact form: both conventions are those of Hugging Face PEFT's checkpoints. The series is
    orthogonal to about ``2 |S|^4`` for the default of 5 terms and diverges for ``|S| > 1``.

    Args:
        skew: (blocks, b * (b - 1) / 2), the rows of the upper triangles one after another, as OFT keeps them, or square
            (blocks, b, b), as BOFT does; any floating dtype; half precision is computed in float32.
        block_size: b.
        neumann_terms: None for the exact transform, else an integer from 1 to 64.

    Returns:
        (blocks, b, b) in float32, or float64 if ``skew`` is.

    Raises:
        TypeError: if ``skew`` is not a floating-point tensor or a number is not an integer.
        ValueError: if the shape does not fit the block size, or a number is out of range.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: ``skew`` and the result.

    Source: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280 (exact);
    Qiu et al., Orthogonal Finetuning Made Scalable, arXiv 2506.19847 (Neumann).

    Example:
        >>> import peftk, torch
        >>> peftk.functional.cayley(torch.tensor([[1.0]]), 2)
        tensor([[[ 0., -1.],
                 [ 1.,  0.]]])
    """
    return registry.apply(Cayley, *_prepare(skew, block_size, neumann_terms=neumann_terms))
