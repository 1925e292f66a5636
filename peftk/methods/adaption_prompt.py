"""Llama-Adapter: what learned prompts add to an attention module's heads (Zhang et al., arXiv 2303.16199)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def share(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    head_dim: int,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return ``gate * softmax(q k^T / sqrt(head_dim)) v``, (batch, tokens, heads * head_dim).

    Args:
        query: (batch, tokens, heads * head_dim), as the projection of the module makes it.
        key: (1, prompt length, key heads * head_dim), the projection of the prompt; the heads may share keys.
        value: As `key`.
        gate: (1,).
        head_dim: The size of one head.
        rotary: Cosine and sine of the rotary embedding, (batch, tokens, head_dim), which turn the query; or None.
    """
    query = query.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (batch, heads, tokens, head_dim)
    if rotary is not None:
        query = _rotate(query, *rotary)
    # The gate scales a few values instead of every score, and a zero gate adds zeros.
    value = (value * gate).to(value.dtype)
    batch, heads = query.shape[:2]
    key, value = (
        t.unflatten(-1, (-1, head_dim)).transpose(1, 2).repeat_interleave(heads * head_dim // t.shape[-1], 1)
        for t in (key, value)
    )
    key, value = (t.to(query.dtype).expand(batch, -1, -1, -1) for t in (key, value))
    result = scaled_dot_product_attention(query, key, value, scale=head_dim**-0.5)
    return result.transpose(1, 2).flatten(2)


def _rotate(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the query, (batch, heads, tokens, head_dim), by the rotary embedding's (batch, tokens, head_dim)."""
    first, second = query.chunk(2, -1)
    return query * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
