"""Trials of the low-rank product."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ._trial import FEATURES, OUT, TOKENS, Trial


def trials(normal: Callable[..., Tensor]) -> list[Trial]:
    """Return the trials of this family."""
    rank, scale = 4, 0.5
    x, weight, bias = normal(TOKENS, FEATURES), normal(OUT, FEATURES, spread=FEATURES**-0.5), normal(OUT)
    a, b = normal(rank, FEATURES, spread=FEATURES**-0.5), normal(OUT, rank, spread=rank**-0.5)
    return [
        Trial(
            "low_rank_add",
            "",
            {"base": normal(TOKENS, OUT), "x": x, "a": a, "b": b},
            {"scale": scale},
            lambda base, x, a, b: base + scale * x @ (b @ a).mT,
        ),
        Trial(
            "low_rank_linear",
            "",
            {"x": x, "weight": weight, "bias": bias, "a": a, "b": b},
            {"scale": scale},
            lambda x, weight, bias, a, b: x @ (weight + scale * b @ a).mT + bias,
        ),
    ]
