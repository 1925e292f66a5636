"""LoKr."""

from __future__ import annotations

from ._recipe import Method

RECIPES = (
    # On the encoder a quarter is slower.
    Method("lokr", "LoKr, rank 8", "LoKrConfig", lambda sizes: {"r": 8, "alpha": 16}, (4e-3, 2e-2)),
)
