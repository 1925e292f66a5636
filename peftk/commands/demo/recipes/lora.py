"""LoRA and DoRA."""

from __future__ import annotations

from ._recipe import Method

RECIPES = (
    Method(
        "lora",
        "LoRA, rank 16",
        "LoraConfig",
        lambda sizes: {"r": 16, "lora_alpha": 32},
        # Half is a little slower on the encoder. On the ConvNet twice as much is as good, four times stops learning.
        (2e-3, 5e-3),
    ),
    Method(
        "dora",
        "DoRA, rank 16",
        "LoraConfig",
        lambda sizes: {"r": 16, "lora_alpha": 32, "use_dora": True},
        # On the ConvNet twice as much is worse, and four times stops learning.
        (2e-3, 5e-3),
    ),
)
