"""Butterfly products, the composition of BOFT's stages, and the scale of its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.shared.butterfly import gather, gather_factors, passes, scatter
from ..runtime import registry
from ..runtime.timings import power_bucket
from ._autograd import run_backward
from ._checks import autocast_input, cast, check_tensor
from .block_diagonal import block_rotate

__all__ = ["butterfly_compose", "butterfly_multiply", "scale_channels"]


def _check_factors(factors: Tensor, x: Tensor | None = None) -> None:
    check_tensor("factors", factors, like=x)
    if factors.dim() != 4 or factors.shape[2] != factors.shape[3] or 0 in factors.shape:
        raise ValueError(f"factors: expected shape (m, nb, b, b) with m, nb, b >= 1; got {tuple(factors.shape)}")
    stages, count, size, _ = factors.shape
    if stages > 1 and size % 2:
        raise ValueError(
            f"factors: expected blocks of an even size, because stages exchange half-blocks; got {tuple(factors.shape)}"
        )
    if count % (1 << min(stages - 1, 62)):
        raise ValueError(
            f"factors: expected (m, nb, b, b) with nb a multiple of 2^(m - 1) = 2^{stages - 1}, because stage m joins "
            f"that many blocks; got {tuple(factors.shape)}"
        )


def _prepare_compose(factors: Tensor) -> tuple[Any, ...]:
    _check_factors(factors)
    return (cast(factors, torch.float32) if factors.dtype in (torch.float16, torch.bfloat16) else factors,)


def _prepare_multiply(x: Tensor, factors: Tensor) -> tuple[Any, ...]:
    check_tensor("x", x)
    _check_factors(factors, x)
    features = factors.shape[1] * factors.shape[2]
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(
            f"x: expected (..., nb * b) = (..., {features}) for factors {tuple(factors.shape)}; got {tuple(x.shape)}"
        )
    x = autocast_input(x)
    if x.dtype is torch.float64 or factors.dtype is torch.float64:
        return x, cast(factors, x.dtype if x.dtype is torch.float64 else torch.float32)
    return x, cast(factors, torch.float32)


def _prepare_scale(x: Tensor, scale: Tensor, bias: Tensor | None = None, *, dim: int = -1) -> tuple[Any, ...]:
    check_tensor("x", x)
    check_tensor("scale", scale, like=x)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an integer; got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected a dimension of x {tuple(x.shape)}; got {dim}")
    dim %= x.dim()
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None:
            check_tensor(name, value, like=x)
            if value.shape != x.shape[dim : dim + 1]:
                raise ValueError(
                    f"{name}: expected shape (channels,) = ({x.shape[dim]},), that of dimension {dim} of x; "
                    f"got {tuple(value.shape)}"
                )
    if x.dtype is torch.float64:
        scale, bias = cast(scale, x.dtype), cast(bias, x.dtype)
    return x, scale, bias, x.shape[dim + 1 :].numel()


def _compose_flops(factors: torch.Size, *_args: object, **_kwargs: object) -> int:
    stages, count, size, _ = factors
    # Stage i fills chunks of b 2^i features, every entry a sum of b / 2 terms.
    return count * size * size * size * ((1 << stages) - 2)


def _multiply_flops(x: torch.Size, factors: torch.Size, *_args: object, **_kwargs: object) -> int:
    return 2 * x.numel() * factors[0] * factors[2]


_compose = registry.define(
    "butterfly",
    "butterfly_compose(Tensor factors) -> Tensor",
    fake=lambda factors: factors.new_empty(
        factors.shape[1] >> (factors.shape[0] - 1),
        factors.shape[2] << (factors.shape[0] - 1),
        factors.shape[2] << (factors.shape[0] - 1),
    ),
    flops=_compose_flops,
    bucket=lambda factors: power_bucket(factors.shape[1] * factors.shape[2], *factors.shape[::2]),
    prepare=_prepare_compose,
)

_compose_backward = registry.define(
    "butterfly",
    "butterfly_compose_backward(Tensor grad, Tensor factors) -> Tensor",
    fake=lambda grad, factors: factors.new_empty(factors.shape),
    flops=lambda grad, factors, *_args, **_kwargs: 2 * _compose_flops(factors),
    bucket=lambda grad, factors: power_bucket(factors.shape[1] * factors.shape[2], *factors.shape[::2]),
)

_multiply = registry.define(
    "butterfly",
    "butterfly_multiply(Tensor x, Tensor factors) -> Tensor",
    fake=lambda x, factors: x.new_empty(x.shape),
    flops=_multiply_flops,
    bucket=lambda x, factors: power_bucket(x.numel() // x.shape[-1], x.shape[-1], *factors.shape[::2]),
    prepare=_prepare_multiply,
)

_multiply_backward = registry.define(
    "butterfly",
    "butterfly_multiply_backward(Tensor grad, Tensor x, Tensor factors, bool need_x, bool need_factors)"
    " -> (Tensor, Tensor)",
    fake=lambda grad, x, factors, need_x, need_factors: (
        grad.new_empty(x.shape if need_x else 0),
        factors.new_empty(factors.shape if need_factors else 0),
    ),
    flops=lambda grad, x, factors, need_x, need_factors, **_kwargs: (
        _multiply_flops(x, factors) * (int(need_x) + need_factors)
    ),
    bucket=lambda grad, x, factors, *_: power_bucket(x.numel() // x.shape[-1], x.shape[-1], *factors.shape[::2]),
)

_scale = registry.define(
    "butterfly",
    "scale_channels(Tensor x, Tensor scale, Tensor? bias, SymInt inner) -> Tensor",
    fake=lambda x, scale, bias, inner: x.new_empty(x.shape),
    flops=lambda x, *_args, **_kwargs: 2 * x.numel(),
    bucket=lambda x, scale, bias, inner: power_bucket(x.numel(), scale.numel(), inner),
    prepare=_prepare_scale,
)

_scale_backward = registry.define(
    "butterfly",
    "scale_channels_backward(Tensor grad, Tensor x, Tensor scale, Tensor? bias, SymInt inner, bool need_x,"
    " bool need_scale, bool need_bias) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, x, scale, bias, inner, need_x, need_scale, need_bias: (
        grad.new_empty(grad.shape if need_x else 0),
        scale.new_empty(scale.shape if need_scale else 0),
        (grad if bias is None else bias).new_empty(bias.shape if need_bias else 0),
    ),
    flops=lambda grad, *_args, **_kwargs: 4 * grad.numel(),
    bucket=lambda grad, x, scale, bias, inner, *_: power_bucket(grad.numel(), scale.numel(), inner),
)


class ButterflyCompose(torch.autograd.Function):
    """Autograd for `butterfly_compose`."""

    @staticmethod
    def forward(factors: Tensor) -> Tensor:
        """Run the operator."""
        return _compose(factors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the factors; the products of the first stages are made again."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Run the backward operator."""
        return run_backward(_compose_backward, grad, *ctx.saved_tensors)


class ButterflyMultiply(torch.autograd.Function):
    """Autograd for `butterfly_multiply`."""

    @staticmethod
    def forward(x: Tensor, factors: Tensor) -> Tensor:
        """Run the operator."""
        return _multiply(x, factors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x and the factors; what lies between two passes is made again."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Run the backward operator."""
        need_x, need_factors = ctx.needs_input_grad
        dx, dfactors = run_backward(_multiply_backward, grad, *ctx.saved_tensors, need_x, need_factors)
        return dx if need_x else None, dfactors if need_factors else None


class ScaleChannels(torch.autograd.Function):
    """Autograd for `scale_channels`."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, bias: Tensor | None, inner: int) -> Tensor:
        """Run the operator."""
        return _scale(x, scale, bias, inner)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x for the gradient of the scale."""
        x, scale, bias, ctx.inner = inputs
        ctx.save_for_backward(x, scale, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Run the backward operator."""
        x, scale, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = run_backward(_scale_backward, grad, x, scale, bias, ctx.inner, *needs)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None)


def butterfly_compose(factors: Tensor) -> Tensor:
    """Multiply the stages of a butterfly out into block-diagonal form.

    ``R = R_(m-1) @ ... @ R_0`` with ``R_i[u, v] = diag(factors[i])[p_i(u), p_i(v)]``, where the permutation p_i sorts
    the half-blocks (of b / 2 features) of every chunk of b 2^i features: those of even number first. R is block
    diagonal with blocks of ``g = b 2^(m-1)`` features, so ``x @ R == block_rotate(x, blocks)``.

    Args:
        factors: stages, the first one first, (m, nb, b, b), any floating dtype; half precision is computed in float32.
            For m > 1, b is even and nb a multiple of ``2^(m-1)``.

    Returns:
        (nb * b / g, g, g) in float32, or float64 if ``factors`` is.

    Raises:
        TypeError: if ``factors`` is not a floating-point tensor.
        ValueError: if its shape is not that of a butterfly.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: the factors; the chain is run again.

    Source: Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243.

    Example:
        >>> import peftk, torch
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> peftk.functional.butterfly_compose(turn.expand(2, 2, 2, 2))[0]
        tensor([[ 0.,  0.,  0.,  1.],
                [ 0.,  0., -1.,  0.],
                [ 0., -1.,  0.,  0.],
                [ 1.,  0.,  0.,  0.]])
    """
    return registry.apply(ButterflyCompose, *_prepare_compose(factors))


def butterfly_multiply(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply activations by a butterfly of any size: ``x @ R`` with R as in `butterfly_compose`.

    Groups of up to 256 features are one block rotation by the composed blocks. Larger ones are several, each by the
    product of some of the stages.

    Args:
        x: activations, (..., nb * b), float64, float32, bfloat16 or float16.
        factors: as in `butterfly_compose`. Operands may be rounded to the dtype of x, and so is what passes from one
            rotation to the next; sums are kept in at least float32.

    Returns:
        The product: shape and dtype of x (its autocast dtype under autocast).

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: if shapes or devices do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x and the factors.

    Source: Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243.

    Example:
        >>> import peftk, torch
        >>> x, factors = torch.randn(3, 16), torch.randn(3, 4, 4, 4)
        >>> dense = torch.block_diag(*peftk.functional.butterfly_compose(factors))
        >>> torch.allclose(peftk.functional.butterfly_multiply(x, factors), x @ dense, atol=1e-4)
        True
    """
    return registry.apply(ButterflyMultiply, *_prepare_multiply(x, factors))


def multiply_transposed(x: Tensor, factors: Tensor) -> Tensor:
    """Return ``x @ R.T`` with R as in `butterfly_compose`; arguments and passes are those of `butterfly_multiply`."""
    size, stages = factors.shape[-1], len(factors)
    # The transposed product begins with the first stages.
    for first, last in passes(size, stages):
        chosen = gather_factors(factors, first, last)
        blocks = butterfly_compose(chosen) if last - first > 1 else chosen[0]
        rotated = block_rotate(gather(x, size, first, last), blocks, transpose=True)
        x = scatter(rotated, size, first, last)
    return x


def scale_channels(x: Tensor, scale: Tensor, bias: Tensor | None = None, *, dim: int = -1) -> Tensor:
    """Scale the channels of a layer's output about its bias: ``y = bias + scale * (x - bias)``.

    It is computed as ``scale * x + (1 - scale) * bias``, so that a scale of one changes no bit of x.

    Args:
        x: the output of a layer, (..., channels, ...), float64, float32, bfloat16 or float16.
        scale: (channels,), any floating dtype; computed in float32 at least.
        bias: (channels,) or None; the part of x that is not scaled.
        dim: the dimension of the channels.

    Returns:
        Shape and dtype of x.

    Raises:
        TypeError: if a tensor is not a floating-point tensor, or ``dim`` not an integer.
        ValueError: if shapes or devices do not fit.
        RuntimeError: if a named backend cannot run the call.

    Saved for backward: x, the scale and the bias.

    Source: Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243.

    Example:
        >>> import peftk, torch
        >>> x, scale, bias = torch.tensor([[3.0, 3.0]]), torch.tensor([2.0, 1.0]), torch.tensor([1.0, 5.0])
        >>> peftk.functional.scale_channels(x, scale, bias)
        tensor([[5., 3.]])
    """
    return registry.apply(ScaleChannels, *_prepare_scale(x, scale, bias, dim=dim))
