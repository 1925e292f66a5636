"""BOFT."""

from __future__ import annotations

from typing import Any

from ._recipe import Method, Sizes, fitting_block

ONE_FACTOR = "without a CUDA compiler, Hugging Face PEFT runs BOFT with one factor, whatever is asked for"


def _boft(sizes: Sizes) -> dict[str, Any]:
    # Two factors join pairs of blocks, so that two blocks must fit.
    half = fitting_block(sizes.inputs, 8) // 2
    factors = 2 if half > 1 else 1
    return {"boft_block_size": half if factors == 2 else 2 * half, "boft_n_butterfly_factor": factors}


RECIPES = (
    Method(
        "boft",
        "BOFT, 2 factors",
        "BOFTConfig",
        _boft,
        # On the encoder a third is no better. On the ConvNet a half and a quarter are slower.
        (3e-3, 2e-2),
        (ONE_FACTOR, ONE_FACTOR),
    ),
)
