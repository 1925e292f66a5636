"""LoHa."""

from __future__ import annotations

from ._recipe import Method

RECIPES = (
    # On the encoder a quarter is slower.
    Method("loha", "LoHa, rank 8", "LoHaConfig", lambda sizes: {"r": 8, "alpha": 16}, (4e-3, 2e-2)),
)
