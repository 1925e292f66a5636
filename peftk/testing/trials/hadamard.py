"""Trials of the Hadamard product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..compare import joined
from ._trial import FEATURES, OUT, Trial


def _factors(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
    a = torch.einsum("ik,jk->ijk", w1_b, w2_b).flatten(0, 1)
    return joined((a, torch.einsum("oi,oj->oij", w1_a, w2_a).flatten(1)))


def trials(normal: Callable[..., Tensor]) -> list[Trial]:
    """Return the trials of this family."""
    rank, scale = 4, 0.5
    factors = {
        "w1_a": normal(OUT, rank),
        "w1_b": normal(rank, FEATURES, spread=rank**-0.5),
        "w2_a": normal(OUT, rank),
        "w2_b": normal(rank, FEATURES, spread=rank**-0.5),
    }
    return [
        Trial("khatri_rao", "", factors, {}, _factors),
        Trial(
            "hadamard_weight",
            "",
            {"weight": normal(OUT, FEATURES), **factors},
            {"scale": scale},
            lambda weight, w1_a, w1_b, w2_a, w2_b: weight + scale * (w1_a @ w1_b) * (w2_a @ w2_b),
        ),
    ]
