"""Block-diagonal rotation: the hot path of OFT and, with composed blocks, of BOFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime import registry
from ..runtime.timings import power_bucket
from ._autograd import run_backward
from ._checks import autocast_input, cast, check_frozen, check_shape, check_tensor
from .plain import ordinary

__all__ = ["block_rotate", "block_rotate_linear"]


def _match(features: int, blocks: Tensor) -> bool:
    count, size, columns = blocks.shape
    if count == 1:
        return size == columns > 0 == features % size
    return size == columns and count * size == features > 0


def _fits_rotation(x: Tensor, blocks: Tensor) -> bool:
    """Say cheaply whether the arguments are right; `_check_rotation` finds out what is wrong."""
    try:
        return _match(x.shape[-1], blocks) and ordinary(x, blocks)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _fits_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> bool:
    """Say cheaply whether the arguments are right; `_check_linear` finds out what is wrong."""
    try:
        out, features = weight.shape
        return (
            x.shape[-1] == features
            and _match(features, blocks)
            and not weight.requires_grad
            and (bias is None or bias.shape == (out,))
            and ordinary(x, blocks, weight, bias)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _check_rotation(x: Tensor, blocks: Tensor) -> None:
    check_tensor("x", x)
    check_tensor("blocks", blocks, like=x)
    if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2] or 0 in blocks.shape:
        raise ValueError(f"blocks: expected shape (nb, b, b) with nb, b >= 1; got {tuple(blocks.shape)}")
    if x.dim() == 0:
        raise ValueError("x: expected at least 1 dimension (..., features); got a 0-dimensional tensor")
    nb, b, _ = blocks.shape
    if x.shape[-1] % b or (nb != 1 and nb * b != x.shape[-1]):
        raise ValueError(
            f"blocks: expected (nb, b, b) with nb * b = {x.shape[-1]}, the last size of x, or one block shared by "
            f"all with b dividing it; got {tuple(blocks.shape)}"
        )


def _block_dtype(x: Tensor, blocks: Tensor) -> Tensor:
    # float64 activations keep float64 blocks and the reverse; everything else computes in float32 inside.
    return cast(blocks, x.dtype) if x.dtype is torch.float64 or blocks.dtype is torch.float64 else blocks


def _prepare_rotate(x: Tensor, blocks: Tensor, *, transpose: bool = False) -> tuple[Any, ...]:
    if not _fits_rotation(x, blocks):
        _check_rotation(x, blocks)
    if torch._C._is_any_autocast_enabled():
        x = autocast_input(x)
    return x, blocks if blocks.dtype is x.dtype else _block_dtype(x, blocks), bool(transpose)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> None:
    _check_rotation(x, blocks)
    check_tensor("weight", weight, like=x)
    check_frozen("weight", weight)
    check_shape("weight", weight, (None, x.shape[-1]), "(out_features, in_features)")
    if bias is not None:
        check_tensor("bias", bias, like=x)
        check_shape("bias", bias, (weight.shape[0],), "(out_features,)")


def _prepare_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> tuple[Any, ...]:
    if not _fits_linear(x, weight, bias, blocks):
        _check_linear(x, weight, bias, blocks)
    if torch._C._is_any_autocast_enabled():
        x = autocast_input(x)
    dtype = x.dtype
    weight = weight if weight.dtype is dtype else cast(weight, dtype)
    bias = bias if bias is None or bias.dtype is dtype else cast(bias, dtype)
    return x, weight, bias, blocks if blocks.dtype is dtype else _block_dtype(x, blocks)


def _rotate_flops(x: torch.Size, blocks: torch.Size, *_args: object, **_kwargs: object) -> int:
    return 2 * x.numel() * blocks[-1]


def _rotate_backward_flops(
    grad: torch.Size, _x: object, blocks: torch.Size, _t: object, need_x: bool, need_blocks: bool, **_kw: object
) -> int:
    return 2 * grad.numel() * blocks[-1] * (need_x + need_blocks)


def _linear_flops(
    x: torch.Size, weight: torch.Size, _bias: object, blocks: torch.Size, *_args: object, **_kw: object
) -> int:
    return 2 * x.numel() * (blocks[-1] + weight[0])


def _linear_backward_flops(
    grad: torch.Size,
    x: torch.Size,
    weight: torch.Size,
    blocks: torch.Size,
    need_x: bool,
    need_blocks: bool,
    _need_bias: bool,
    **_kw: object,
) -> int:
    product = 2 * grad.numel() * weight[1] * (need_x or need_blocks)
    return product + 2 * x.numel() * blocks[-1] * (need_x + need_blocks)


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


_rotate = registry.define(
    "block_diagonal",
    "block_rotate(Tensor x, Tensor blocks, bool transpose) -> Tensor",
    fake=lambda x, blocks, transpose: x.new_empty(x.shape),
    flops=_rotate_flops,
    bucket=lambda x, blocks, *_: power_bucket(_rows(x), x.shape[-1], blocks.shape[-1]),
    prepare=_prepare_rotate,
)

_rotate_backward = registry.define(
    "block_diagonal",
    "block_rotate_backward(Tensor grad, Tensor x, Tensor blocks, bool transpose, bool need_x, bool need_blocks)"
    " -> (Tensor, Tensor)",
    fake=lambda grad, x, blocks, transpose, need_x, need_blocks: (
        grad.new_empty(x.shape if need_x else 0),
        blocks.new_empty(blocks.shape if need_blocks else 0),
    ),
    flops=_rotate_backward_flops,
    bucket=lambda grad, x, blocks, *_: power_bucket(_rows(x), x.shape[-1], blocks.shape[-1]),
)

_rotate_linear = registry.define(
    "block_diagonal",
    "block_rotate_linear(Tensor x, Tensor weight, Tensor? bias, Tensor blocks) -> Tensor",
    fake=lambda x, weight, bias, blocks: x.new_empty(*x.shape[:-1], weight.shape[0]),
    flops=_linear_flops,
    bucket=lambda x, weight, bias, blocks: power_bucket(_rows(x), *weight.shape, blocks.shape[-1]),
    prepare=_prepare_linear,
)

_rotate_linear_backward = registry.define(
    "block_diagonal",
    "block_rotate_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor blocks, bool need_x,"
    " bool need_blocks, bool need_bias) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, x, weight, blocks, need_x, need_blocks, need_bias: (
        grad.new_empty(x.shape if need_x else 0),
        blocks.new_empty(blocks.shape if need_blocks else 0),
        grad.new_empty(weight.shape[0] if need_bias else 0),
    ),
    flops=_linear_backward_flops,
    bucket=lambda grad, x, weight, blocks, *_: power_bucket(_rows(x), *weight.shape, blocks.shape[-1]),
)


class BlockRotate(torch.autograd.Function):
    """Autograd for `block_rotate`."""

    @staticmethod
    def forward(x: Tensor, blocks: Tensor, transpose: bool) -> Tensor:
        """Run the operator."""
        return _rotate(x, blocks, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x (for the blocks) and the blocks (for x)."""
        x, blocks, ctx.transpose = inputs
        ctx.save_for_backward(x, blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Run the backward operator."""
        x, blocks = ctx.saved_tensors
        need_x, need_blocks, _ = ctx.needs_input_grad
        dx, dblocks = run_backward(_rotate_backward, grad, x, blocks, ctx.transpose, need_x, need_blocks)
        return dx if need_x else None, dblocks if need_blocks else None, None


class BlockRotateLinear(torch.autograd.Function):
    """Autograd for `block_rotate_linear`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor:
        """Run the operator."""
        return _rotate_linear(x, weight, bias, blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x, the blocks and a reference to the frozen weight."""
        x, weight, _bias, blocks = inputs
        ctx.save_for_backward(x, weight, blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Run the backward operator."""
        x, weight, blocks = ctx.saved_tensors
        need_x, _, need_bias, need_blocks = ctx.needs_input_grad
        dx, dblocks, dbias = run_backward(
            _rotate_linear_backward, grad, x, weight, blocks, need_x, need_blocks, need_bias
        )
        return (
            dx if need_x else None,
            None,
            dbias if need_bias else None,
            dblocks if need_blocks else None,
        )


def block_rotate(x: Tensor, blocks: Tensor, *, transpose: bool = False) -> Tensor:
    """Multiply every block of b features by its own b x b matrix, as OFT rotates its input.

    ``y[..., n*b:(n+1)*b] = x[..., n*b:(n+1)*b] @ blocks[n]``, or ``@ blocks[n].T`` with ``transpose``.
    A weight W (out, in) of a layer whose input is rotated by R becomes
    ``block_rotate(W, R, transpose=True)``: then ``linear(block_rotate(x, R), W) == linear(x, W')``.

    Args:
        x: activations, (..., features), float64, float32, bfloat16 or float16.
        blocks: matrices, (features / b, b, b), or (1, b, b) to share one; any floating dtype. Operands may be
            rounded to the dtype of x, sums are kept in at least float32.
        transpose: multiply by the transposed matrices.

    Returns:
        The rotated activations: shape and dtype of x (its autocast dtype under autocast).

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: if shapes or devices do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x and the blocks.

    Source: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280; the
    input-side form: Qiu et al., Orthogonal Finetuning Made Scalable, arXiv 2506.19847.

    Example:
        >>> import peftk, torch
        >>> quarter_turn = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])
        >>> peftk.functional.block_rotate(torch.tensor([1.0, 0.0, 0.0, 2.0]), quarter_turn)
        tensor([ 0.,  1., -2.,  0.])
    """
    return registry.apply(BlockRotate, *_prepare_rotate(x, blocks, transpose=transpose))


def block_rotate_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor:
    """Rotate the input of a frozen linear layer block by block: ``linear(block_rotate(x, blocks), weight, bias)``.

    One operator instead of two, so that the backward pass writes the gradient of x over the product
    ``grad @ weight`` instead of into a fresh buffer.

    Args:
        x: activations, (..., in_features), float64, float32, bfloat16 or float16.
        weight: frozen weight, (out_features, in_features).
        bias: (out_features,) or None; may require grad.
        blocks: as in `block_rotate`.

    Returns:
        (..., out_features) in the dtype of x (its autocast dtype under autocast).

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: if shapes or devices do not fit, or if the weight requires grad.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x, the blocks and a reference to the weight; never the rotated activations.

    Source: Qiu et al., Orthogonal Finetuning Made Scalable, arXiv 2506.19847.

    Example:
        >>> import peftk, torch
        >>> x, weight = torch.randn(3, 4), torch.randn(5, 4)
        >>> y = peftk.functional.block_rotate_linear(x, weight, None, torch.eye(2).expand(2, 2, 2))
        >>> torch.equal(y, torch.nn.functional.linear(x, weight))
        True
    """
    return registry.apply(BlockRotateLinear, *_prepare_linear(x, weight, bias, blocks))
