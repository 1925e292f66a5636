"""DoRA: the magnitude of every output row of a LoRA layer is a parameter of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._autograd import apply

_CHUNK = 1 << 20


class Magnitude(nn.Module):
    """The magnitudes of one adapter: `weight` (out,), or (1, out, 1, 1) for a convolution."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


@torch.no_grad()
def row_norms(weight: Tensor) -> Tensor:
    """Return the norm of every ``weight[i]``, in float32 at least, without a float32 copy of the weight."""
    dims = tuple(range(1, weight.dim()))
    if weight.dtype in (torch.float32, torch.float64):
        return torch.linalg.vector_norm(weight, dim=dims)
    rows = max(1, _CHUNK // max(weight[:1].numel(), 1))
    return torch.cat([torch.linalg.vector_norm(chunk.float(), dim=dims) for chunk in weight.split(rows)])


@torch.no_grad()
def adapted_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """Return the norms of the rows of ``W + scale * B A`` without that matrix; where B is zero, exactly those of W.

    ``||W||^2 + 2 scale <B, W A^T> + scale^2 <B (A A^T), B>``, row by row.

    Args:
        weight: (out, in) or a convolution's (out, in, height, width).
        a: (rank, in) or (rank, in, height, width).
        b: (out, rank).
        scale: The scale.
    """
    own = row_norms(weight)
    a, b = a.flatten(1), b.to(own.dtype)
    cross = (weight.flatten(1) @ a.to(weight.dtype).mT).to(own.dtype)
    a = a.to(own.dtype)
    update = 2 * scale * (b * cross).sum(1) + scale**2 * (b @ (a @ a.mT) * b).sum(1)
    # The root of a square is the number itself, so that an update of zero changes no bit.
    return (own * own + update).clamp_min(0).sqrt()


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return ``magnitude / norms``, (out,), through which no gradient reaches the norms; a zero row is left alone."""
    magnitude = magnitude.view(-1)
    norms = norms.detach().to(magnitude.dtype)
    return magnitude / torch.where(norms == 0, torch.ones_like(norms), norms)


class _Rescale(torch.autograd.Function):
    """``base + extra * (base - bias)``; saves the base output."""

    @staticmethod
    def forward(base: Tensor, bias: Tensor | None, extra: Tensor) -> Tensor:
        out = base.clone() if bias is None else base - bias
        return out.mul_(extra.to(base.dtype)).add_(base)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        base, bias, extra = ctx.saved_tensors
        need_base, need_bias, need_extra = ctx.needs_input_grad
        others = [i for i in range(base.dim()) if i != base.dim() - extra.dim()]

        def reduced(t: Tensor) -> Tensor:
            return (t.sum(others, dtype=extra.dtype) if others else t.to(extra.dtype)).view_as(extra)

        dbase = torch.addcmul(grad, grad, extra.to(grad.dtype)) if need_base else None
        total = reduced(grad) if bias is not None else None
        dbias = -(extra * total).to(bias.dtype) if need_bias else None
        dextra = None
        if need_extra:
            dextra = reduced(grad * base)
            dextra = dextra if bias is None else dextra - bias.to(extra.dtype) * total
        return dbase, dbias, dextra


def rescale(base: Tensor, bias: Tensor | None, g: Tensor) -> Tensor:
    """Return ``base + (g - 1) * (base - bias)``: exactly the base output where g is 1.

    Args:
        base: A base layer's output.
        bias: Its bias, shaped so that it broadcasts, or None.
        g: Shaped likewise, in any dtype.
    """
    bias = None if bias is None else bias.to(base.dtype).view_as(g)
    return apply(_Rescale, base, bias, g - 1)
