"""X-LoRA."""

from __future__ import annotations

from ._recipe import Method

RECIPES = (
    Method(
        "xlora",
        "X-LoRA, 2 experts",
        "XLoraConfig",
        lambda sizes: {"xlora_depth": 2, "xlora_size": 64, "xlora_dropout_p": 0.0},
        (1e-2, 1e-2),
        experts=2,
        note="X-LoRA mixes two LoRA adapters that were trained before, each on every second class. What it mixes "
        "differs from token to token, so that no weight can hold it: it is not merged",
    ),
)
