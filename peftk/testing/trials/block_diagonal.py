"""Trials of the block rotation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._trial import FEATURES, OUT, SIZE, TOKENS, Trial


def trials(normal: Callable[..., Tensor]) -> list[Trial]:
    """Return the trials of this family."""
    x, weight, bias = normal(TOKENS, FEATURES), normal(OUT, FEATURES, spread=FEATURES**-0.5), normal(OUT)
    blocks = normal(FEATURES // SIZE, SIZE, SIZE, spread=SIZE**-0.5)
    return [
        Trial(
            "block_rotate",
            "",
            {"x": x, "blocks": blocks},
            {},
            lambda x, blocks: x @ torch.block_diag(*blocks),
        ),
        Trial(
            "block_rotate_linear",
            "",
            {"x": x, "weight": weight, "bias": bias, "blocks": blocks},
            {},
            lambda x, weight, bias, blocks: x @ torch.block_diag(*blocks) @ weight.mT + bias,
        ),
    ]
