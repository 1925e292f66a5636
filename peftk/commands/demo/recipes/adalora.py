"""AdaLoRA."""

from __future__ import annotations

from typing import Any

from ._recipe import Method, Sizes


def _ada(sizes: Sizes) -> dict[str, Any]:
    # A sixth of the steps at full rank, a third at the end with the ranks that were found.
    times = {"tinit": sizes.steps // 6, "tfinal": sizes.steps // 3, "deltaT": max(1, sizes.steps // 30)}
    return {"init_r": 16, "target_r": 8, "lora_alpha": 32, "total_step": sizes.steps, **times}


RECIPES = (
    # On the encoder a fifth is slower.
    Method("adalora", "AdaLoRA, rank 16 to 8", "AdaLoraConfig", _ada, (1e-2, 2e-2)),
)
