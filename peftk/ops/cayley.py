"""The Cayley transform: orthogonal blocks from the upper triangles of skew-symmetric ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _registry
from .._tuning import power_bucket
from ._autograd import apply, run_backward
from ._checks import check_tensor

__all__ = ["cayley"]

MAX_TERMS = 64


def _prepare(packed: Tensor, block_size: int, *, neumann_terms: int | None = None) -> tuple:
    check_tensor("packed", packed)
    for name, value in (("block_size", block_size), ("neumann_terms", neumann_terms)):
        if (not isinstance(value, int) and not (name == "neumann_terms" and value is None)) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an integer; got {type(value).__name__}")
    if block_size < 1:
        raise ValueError(f"block_size: expected a positive integer; got {block_size}")
    if neumann_terms is not None and not 1 <= neumann_terms <= MAX_TERMS:
        raise ValueError(f"neumann_terms: expected None or an integer from 1 to {MAX_TERMS}; got {neumann_terms}")
    triangle = block_size * (block_size - 1) // 2
    if packed.dim() != 2 or packed.shape[1] != triangle:
        raise ValueError(
            f"packed: expected shape (nb, b * (b - 1) / 2) = (nb, {triangle}) for block_size {block_size}; "
            f"got {tuple(packed.shape)}"
        )
    if packed.dtype in (torch.float16, torch.bfloat16):
        packed = packed.float()
    return packed, block_size, [] if neumann_terms is None else _polynomial(neumann_terms)


def _polynomial(terms: int) -> list[float]:
    """Return the coefficients that a number of Neumann terms means in Hugging Face PEFT, the constant first."""
    if terms <= 2:
        return [1.0, 2.0][:terms]
    return [1.0, *[2.0] * (max(terms, 4) - 2), 1.0]


def _flops(packed: torch.Size, block_size: int, polynomial: list, *_args: object, **_kwargs: object) -> int:
    products = max(len(polynomial) - 2, 0) if polynomial else 4 / 3
    return int(2 * products * packed[0] * block_size**3)


def _backward_flops(
    grad: torch.Size, _packed: object, blocks: torch.Size, polynomial: list, *_args: object, **_kwargs: object
) -> int:
    products = 3 * max(len(polynomial) - 2, 0) if polynomial else 2
    return 2 * products * blocks[0] * blocks[1] ** 3


def _bucket(count: int, size: int, polynomial: list) -> tuple:
    return (*power_bucket(count, size), bool(polynomial))


_forward = _registry.define(
    "cayley",
    "cayley(Tensor packed, int block_size, float[] polynomial) -> Tensor",
    fake=lambda packed, block_size, polynomial: packed.new_empty(packed.shape[0], block_size, block_size),
    flops=_flops,
    bucket=lambda packed, block_size, polynomial: _bucket(packed.shape[0], block_size, polynomial),
    prepare=_prepare,
)

_backward = _registry.define(
    "cayley",
    "cayley_backward(Tensor grad, Tensor packed, Tensor blocks, float[] polynomial) -> Tensor",
    fake=lambda grad, packed, blocks, polynomial: packed.new_empty(packed.shape),
    flops=_backward_flops,
    bucket=lambda grad, packed, blocks, polynomial: _bucket(blocks.shape[0], blocks.shape[1], polynomial),
)


class Cayley(torch.autograd.Function):
    """Autograd for `cayley`."""

    @staticmethod
    def forward(packed: Tensor, block_size: int, polynomial: list) -> Tensor:
        """Run the operator."""
        return _forward(packed, block_size, polynomial)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        """Save the result, which makes the exact backward pass two products instead of a second solve."""
        packed, _, ctx.polynomial = inputs
        ctx.save_for_backward(packed, output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        """Run the backward operator."""
        packed, blocks = ctx.saved_tensors
        return run_backward("cayley", _backward, grad, packed, blocks, ctx.polynomial), None, None


def cayley(packed: Tensor, block_size: int, *, neumann_terms: int | None = None) -> Tensor:
    """Turn upper triangles into orthogonal blocks by the Cayley transform, exactly or by a Neumann series.

    ``S = U - U.T`` with U the strictly upper triangular matrix whose rows are packed one after another. Exact:
    ``(I - S) @ inv(I + S)``. With ``neumann_terms`` n: ``I + 2 S + ... + 2 S^(d-1) + S^d`` of degree d = n - 1
    (n = 3 means 3 as well; n = 1 is I, n = 2 is I + 2 S), which approximates ``(I + S) @ inv(I - S)``, the
    *inverse* of the exact form: both conventions are those of Hugging Face PEFT's checkpoints. The series is
    orthogonal to about ``2 |S|^4`` for the default of 5 terms and diverges for ``|S| > 1``.

    Args:
        packed: (blocks, b * (b - 1) / 2), any floating dtype; half precision is computed in float32.
        block_size: b.
        neumann_terms: None for the exact transform, else an integer from 1 to 64.

    Returns:
        (blocks, b, b) in float32, or float64 if ``packed`` is.

    Raises:
        TypeError: if ``packed`` is not a floating-point tensor or a number is not an integer.
        ValueError: if the shape does not fit the block size, or a number is out of range.
        RuntimeError: if a named backend cannot run the call; when differentiated twice.

    Saved for backward: the triangles and the result.

    Source: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280 (exact);
    Qiu et al., Orthogonal Finetuning Made Scalable, arXiv 2506.19847 (Neumann).

    Example:
        >>> import peftk, torch
        >>> peftk.functional.cayley(torch.tensor([[1.0]]), 2)
        tensor([[[ 0., -1.],
                 [ 1.,  0.]]])
    """
    return apply(Cayley, *_prepare(packed, block_size, neumann_terms=neumann_terms))
