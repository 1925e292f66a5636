"""Trials of the Kronecker product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._trial import FEATURES, OUT, SIZE, TOKENS, Trial


def trials(normal: Callable[..., Tensor]) -> list[Trial]:
    """Return the trials of this family."""
    scale, columns = 0.5, FEATURES // SIZE
    x, weight, bias = normal(TOKENS, FEATURES), normal(OUT, FEATURES, spread=FEATURES**-0.5), normal(OUT)
    w1, w2 = normal(SIZE, SIZE, spread=SIZE**-0.5), normal(OUT // SIZE, columns, spread=columns**-0.5)
    factors = {"w1": w1, "w2": w2}
    return [
        Trial(
            "kronecker_add",
            "",
            {"base": normal(TOKENS, OUT), "x": x, **factors},
            {"scale": scale},
            lambda base, x, w1, w2: base + scale * x @ torch.kron(w1, w2).mT,
        ),
        Trial(
            "kronecker_linear",
            "",
            {"x": x, "weight": weight, "bias": bias, **factors},
            {"scale": scale},
            lambda x, weight, bias, w1, w2: x @ (weight + scale * torch.kron(w1, w2)).mT + bias,
        ),
        Trial(
            "kronecker_weight",
            "",
            {"weight": weight, **factors},
            {"scale": scale},
            lambda weight, w1, w2: weight + scale * torch.kron(w1, w2),
        ),
    ]
