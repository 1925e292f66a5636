"""DoRA's norms and its output in C++ on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _C  # noqa: F401 - importing it registers the operators of peftk_native
from ..shared.dora import compose_backward
from ._supports import supports_activations
from .butterfly import scale_channels_backward
from .low_rank import _as_rows, _like, low_rank_add_backward, shrink

# Looked up once: the look-up of an operator by name costs as much as a small kernel.
_norm = torch.ops.peftk_native.dora_norm.default
_compose = torch.ops.peftk_native.dora_compose.default


def dora_norm_supports(weight: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot find the norms."""
    return supports_activations(weight)


def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.dora_norm`."""
    transposed = not weight.is_contiguous() and weight.mT.is_contiguous()
    out = weight.new_empty(weight.shape[0], dtype=torch.float32)
    _norm(weight.mT if transposed else weight.contiguous(), a.contiguous(), b.contiguous(), transposed, scale, out)
    return out


def _reason(base: Tensor, x: Tensor) -> str | None:
    if base.dtype is not x.dtype:
        return f"the C++ kernels take base and x of one dtype; got {base.dtype} and {x.dtype}"
    return supports_activations(x)


def dora_compose_supports(base: Tensor, x: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot compose the output."""
    return _reason(base, x)


def dora_compose(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, gain: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and the rank-sized product ``x @ a.T``; see `peftk.functional.dora_compose`."""
    hidden = shrink(_as_rows(x), a, b)
    base = base.contiguous()
    out = torch.empty_like(base)
    bias = None if bias is None else bias.float().contiguous()
    _compose(base, hidden.contiguous(), b.float().contiguous(), gain.contiguous(), bias, scale, out)
    return out, _like(hidden, x)


def dora_compose_backward_supports(grad: Tensor, base: Tensor, x: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    return _reason(grad, x)


def dora_compose_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients in base, x, a, b, the gain and the bias; an empty tensor for one not needed."""
    return compose_backward(scale_channels_backward, low_rank_add_backward, *args)
