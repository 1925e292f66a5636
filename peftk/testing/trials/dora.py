"""Trials of DoRA's norms and of its output."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ._trial import FEATURES, OUT, TOKENS, Trial


def trials(normal: Callable[..., Tensor]) -> list[Trial]:
    """Return the trials of this family."""
    rank, scale = 4, 0.5
    a, b = normal(rank, FEATURES, spread=FEATURES**-0.5), normal(OUT, rank, spread=rank**-0.5)
    return [
        Trial(
            "dora_norm",
            "",
            {"weight": normal(OUT, FEATURES, spread=FEATURES**-0.5), "a": a, "b": b},
            {"scale": scale},
            # The norm is a constant.
            lambda weight, a, b: (weight + scale * b @ a).norm(dim=1).detach(),
        ),
        Trial(
            "dora_compose",
            "",
            {
                **{"base": normal(TOKENS, OUT), "x": normal(TOKENS, FEATURES), "a": a, "b": b},
                **{"gain": 1 + normal(OUT, spread=0.1), "bias": normal(OUT)},
            },
            {"scale": scale},
            lambda base, x, a, b, gain, bias: bias + gain * (base - bias + scale * x @ (b @ a).mT),
        ),
    ]
