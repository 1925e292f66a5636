"""Rows of an embedding, and of a linear layer tied to it, that are trained in place of those of the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from ._base_layer import NONE


class Tokens(NamedTuple):
    """The trained rows of one adapter.

    Attributes:
        indices: (n,), which rows of the weight they replace; each once.
        rows: (n, dim), any floating dtype; rounded to that of the weight.
    """

    indices: Tensor
    rows: Tensor


def embedding(
    base: nn.Embedding,
    x: Tensor,
    adapters: Sequence[Tokens],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of an embedding some of whose rows are replaced.

    Args:
        base: An nn.Embedding; frozen. One that scales what it has looked up does so here too.
        x: Indices, (...).
        adapters: Their rows; of a row that several have, the last one counts.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.

    Returns:
        (..., dim) in the dtype of the base layer's output. The row `padding_idx` gets no gradient.
    """
    result = base(x, *args, **kwargs)
    for adapter in adapters:
        result = replace_looked_up(base, result, x, adapter)
    return result


def replace_looked_up(
    base: nn.Embedding, result: Tensor, x: Tensor, adapter: Tokens, samples: Tensor | None = None
) -> Tensor:
    """Replace the rows that an embedding has looked up, (..., dim), where the indices x, (...), name trained ones.

    Args:
        base: The embedding.
        result: Its output.
        x: Its input.
        adapter: The rows.
        samples: (batch,), in which samples they are replaced; None for all of them.
    """
    place, found = _places(adapter.indices, x)
    if samples is not None:
        found = found & samples.view(-1, *[1] * (x.dim() - 1))
    rows = adapter.rows
    if base.padding_idx is not None:
        rows = torch.where((adapter.indices == base.padding_idx)[:, None], rows.detach(), rows)
    looked_up = tf.embedding(place, rows).to(result.dtype)
    scale = getattr(base, "embed_scale", None)
    if scale is not None:
        looked_up = looked_up * torch.as_tensor(scale, dtype=result.dtype, device=result.device)
    return torch.where(found.unsqueeze(-1), looked_up, result)


def _places(indices: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every entry of x where it stands in `indices`, or anything, and whether it does."""
    if len(indices) == 0:
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    ordered, order = indices.sort()
    at = torch.searchsorted(ordered, x.contiguous().to(indices.dtype)).clamp_max(len(indices) - 1)
    return order[at], ordered[at] == x


def linear(
    base: nn.Linear, x: Tensor, adapters: Sequence[Tokens], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NONE
) -> Tensor:
    """Return the output of a linear layer some of whose rows are replaced, such as a head tied to an embedding.

    Args:
        base: An nn.Linear; frozen. Its bias stays.
        x: (..., dim).
        adapters: Their rows; of a row that several have, the last one counts.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.

    Returns:
        (..., out) in the dtype of the base layer's output.
    """
    result = base(x, *args, **kwargs)
    for adapter in adapters:
        result = replace_products(base, result, x, adapter)
    return result


def replace_products(
    base: nn.Linear, result: Tensor, x: Tensor, adapter: Tokens, samples: Tensor | None = None
) -> Tensor:
    """Replace those outputs of a linear layer, (..., out), that belong to trained rows.

    Args:
        base: The layer.
        result: Its output.
        x: Its input, (..., dim).
        adapter: The rows.
        samples: (batch,), in which samples they are replaced; None for all of them.
    """
    indices = adapter.indices
    bias = None if base.bias is None else base.bias[indices].to(result.dtype)
    products = tf.linear(x.to(result.dtype), adapter.rows.to(result.dtype), bias).to(result.dtype)
    if samples is not None:
        there = samples.view(-1, *[1] * (result.dim() - 1))
        products = torch.where(there, products, result.index_select(-1, indices))
    return result.index_copy(-1, indices, products)


def merged(weight: Tensor, adapter: Tokens) -> Tensor:
    """Return a weight, (num, dim), with the rows of one adapter in it."""
    return weight.index_copy(0, adapter.indices, adapter.rows.detach().to(weight.dtype))
