"""C3A."""

from __future__ import annotations

from typing import Any

from ._recipe import Method, Sizes, fitting_block

WRONG_GRADIENT = "Hugging Face PEFT's C3A has another input gradient, so its training differs"


def _c3a(sizes: Sizes) -> dict[str, Any]:
    # Four blocks a side at least: an update of a small layer in one block would be a handful of numbers.
    every = (*sizes.inputs, *sizes.outputs)
    return {"block_size": fitting_block(every, min(64, min(every) // 4)), "init_weights": True}


RECIPES = (
    Method(
        "c3a",
        "C3A",
        "C3AConfig",
        _c3a,
        # On the encoder a third is no better. On the ConvNet a third, a sixth and three times as much are worse.
        (1e-1, 3e-1),
        (WRONG_GRADIENT, WRONG_GRADIENT),
        ("point",),
    ),
)
