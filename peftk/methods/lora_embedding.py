"""LoRA on embeddings: the columns of A that the input names, times B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from .. import functional as F
from ..kernels.shared.wide import wide
from . import dora
from ._base_layer import NONE
from .lora import LowRank, mixed_gate, mixed_groups, side_by_side


def embedding(
    base: nn.Embedding,
    x: Tensor,
    adapters: Sequence[LowRank],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of an embedding with adapters, times `embed_scale` where the layer has one.

    Args:
        base: An nn.Embedding; frozen.
        x: Indices, (...).
        adapters: What is added, in this order; one with magnitudes rescales what is there before it.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.

    Returns:
        (..., dim) in the dtype of the base layer's output.
    """
    result = base(x, *args, **kwargs)
    for adapter in adapters:
        result = add(base, result, x, adapter)
    return result


def add(base: nn.Embedding, result: Tensor, x: Tensor, adapter: LowRank) -> Tensor:
    """Apply an adapter to the output of an embedding, (..., dim), that looked up the indices x, (...)."""
    b = adapter.b
    if adapter.magnitude is not None:
        g = dora.gain_of(base, adapter)
        result = F.scale_channels(result, g)
        b = b * g.unsqueeze(1)
    return added(result, look_up(base, x, adapter.a, result.dtype), b, adapter.scale)


def look_up(base: nn.Embedding, x: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the columns of A, (r, num), that x names, (..., r), in float32 at least for an output of this dtype.

    The row `padding_idx` gets no gradient.
    """
    dtype = wide(dtype)
    hidden = tf.embedding(x, a.mT, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq).to(dtype)
    # Some embeddings, such as Gemma's, scale what they have looked up.
    scale = getattr(base, "embed_scale", None)
    return hidden if scale is None else hidden * torch.as_tensor(scale, dtype=dtype, device=hidden.device)


def added(result: Tensor, hidden: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """Return ``result + scale * hidden B^T`` for (..., dim), (..., r) and (dim, r), rounded once."""
    rows = result.reshape(-1, result.shape[-1]).to(hidden.dtype)
    if isinstance(scale, Tensor):
        b, scale = b * scale, 1.0
    hidden = hidden.reshape(-1, hidden.shape[-1])
    # An embedding keeps its dtype under autocast, which would round the base output here.
    with torch.autocast(rows.device.type, enabled=False):
        return torch.addmm(rows, hidden, b.to(hidden.dtype).mT, alpha=scale).view(result.shape).to(result.dtype)


def embedding_mixed(
    base: nn.Embedding,
    x: Tensor,
    adapters: Sequence[LowRank],
    choice: Sequence[int],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of an embedding on a batch whose samples have different adapters; see `lora.linear_mixed`."""
    result = base(x, *args, **kwargs)
    for group in mixed_groups(adapters):
        a, b = side_by_side(adapters, group)
        gate = mixed_gate(adapters, group, choice, result)
        hidden = look_up(base, x, a, result.dtype) * gate.view(len(gate), *[1] * (x.dim() - 1), -1)
        result = added(result, hidden, b, 1.0)
    return result
