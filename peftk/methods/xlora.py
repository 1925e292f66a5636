"""X-LoRA: LoRA experts side by side in one low-rank product, weighted for every token (Buehler & Buehler, arXiv
2402.07148).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..ops.conv import Convolution, convolve_thin
from ..ops.dropout import Dropout
from . import lora_embedding
from ._base_layer import NONE, call, plain_tensors
from .lora import LowRank
from .lora_conv import expanded


def linear(
    base: nn.Module,
    x: Tensor,
    experts: Sequence[LowRank],
    gate: Tensor,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of a linear layer with experts.

    Args:
        base: As in `lora.linear`.
        x: (..., in).
        experts: Their scales and gates have no meaning here.
        gate: What every rank of every expert is multiplied with, one expert behind the other: (total rank,) or
            (..., total rank) with the leading shape of x.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    plain = plain_tensors(base, x, args, kwargs)
    result = None
    if plain is None:
        result = call(base, x, *args, **kwargs)
        x = x.to(result.dtype)
    for p, part, columns in _groups(experts):
        a, b = _together(part)
        options: dict[str, Any] = {"gate": gate[..., columns].contiguous(), "dropout_p": p}
        if result is None:
            assert plain is not None
            result = F.low_rank_linear(x, *plain, a, b, **options)
        else:
            result = F.low_rank_add(result, x, a, b, **options)
    return base(x) if result is None else result


def conv(
    base: Convolution,
    x: Tensor,
    experts: Sequence[LowRank],
    gate: Tensor,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of a convolution with experts.

    Args:
        base: As in `lora_conv.conv`.
        x: (batch, in, *size) or, with a gate for all of it, (in, *size).
        experts: Their scales and gates have no meaning here.
        gate: (total rank,), or (batch, total rank, *size) with one entry for each place of x, or with ones as the
            size.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    result = base(x, *args, **kwargs)
    x = x.to(result.dtype)
    single = (1,) * len(base.kernel_size)
    everywhere = gate.dim() > 1 and gate.shape[2:] != single
    if gate.dim() == 1:
        gate = gate.view(1, -1, *single)
    unpadded = "same", "valid", (0,) * len(single)
    plain = base.kernel_size == single and base.stride == single and base.padding in unpadded
    before = everywhere and not plain
    for p, part, columns in _groups(experts, apart=before or base.groups > 1):
        a, b = _together(part)
        own, seen = gate[:, columns], Dropout(x, p)
        read = functools.partial(convolve_thin, base)
        if before:
            # A reads several places, so that the weight goes on each of them.
            hidden = read((seen.dropped() * own[:, :1]).to(x.dtype), a)
        else:
            hidden = seen.product(read, a)
            hidden = (hidden * own).to(hidden.dtype)
        result = expanded(base, result, hidden, b, 1.0)
    return result


def embedding(
    base: nn.Embedding,
    x: Tensor,
    experts: Sequence[LowRank],
    gate: Tensor,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of an embedding with experts; the gate is that of `linear`, and x holds indices, (...)."""
    result = base(x, *args, **kwargs)
    a, b = _together(experts)
    hidden = lora_embedding.look_up(base, x, a, result.dtype)
    return lora_embedding.added(result, (hidden * gate).to(hidden.dtype), b, 1.0)


def _groups(experts: Sequence[LowRank], apart: bool = False) -> list[tuple[float, Sequence[LowRank], slice]]:
    """Return the experts that run together, their dropout probability, and where their ranks stand in the gate."""
    if not apart and len({expert.dropout_p for expert in experts}) == 1:
        return [(experts[0].dropout_p, experts, slice(None))]
    groups: list[tuple[float, Sequence[LowRank], slice]] = []
    start = 0
    for expert in experts:
        rank = expert.a.shape[0]
        groups.append((expert.dropout_p, [expert], slice(start, start + rank)))
        start += rank
    return groups


def _together(experts: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """Return A and B of some experts, one behind the other along the rank."""
    if len(experts) == 1:
        return experts[0].a, experts[0].b
    return torch.cat([expert.a for expert in experts]), torch.cat([expert.b for expert in experts], 1)
