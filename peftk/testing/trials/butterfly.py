"""Trials of butterfly products and of the scale of channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._trial import FEATURES, OUT, SIZE, TOKENS, Trial

STAGES = 3


def _dense(factors: Tensor) -> Tensor:
    """Multiply the stages as dense matrices."""
    size, product = factors.shape[-1], None
    for stage, blocks in enumerate(factors):
        halves = torch.arange(FEATURES, device=factors.device).view(-1, 1 << stage, 2, size // 2)
        order = halves.transpose(1, 2).reshape(-1)
        dense = torch.block_diag(*blocks)[order][:, order]
        product = dense if product is None else dense @ product
    return product


def _blocks(factors: Tensor) -> Tensor:
    group = SIZE << (STAGES - 1)
    dense = _dense(factors)
    return torch.stack([dense[at : at + group, at : at + group] for at in range(0, FEATURES, group)])


def trials(normal: Callable[..., Tensor]) -> list[Trial]:
    """Return the trials of this family."""
    factors = normal(STAGES, FEATURES // SIZE, SIZE, SIZE, spread=SIZE**-0.5)
    return [
        Trial("butterfly_compose", "", {"factors": factors}, {}, _blocks),
        Trial(
            "butterfly_multiply",
            "",
            {"x": normal(TOKENS, FEATURES), "factors": factors},
            {},
            lambda x, factors: x @ _dense(factors),
        ),
        Trial(
            "scale_channels",
            "",
            {"x": normal(TOKENS, OUT), "scale": normal(OUT), "bias": normal(OUT)},
            {},
            lambda x, scale, bias: (x - bias) @ torch.diag(scale) + bias,
        ),
    ]
