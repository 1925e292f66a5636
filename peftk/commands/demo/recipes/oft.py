"""OFT."""

from __future__ import annotations

from ._recipe import Method, fitting_block

CONV_OFT = "Hugging Face PEFT's OFT on a convolution computes something else than its merged weight"


RECIPES = (
    Method(
        "oft",
        "OFT, Cayley-Neumann",
        "OFTConfig",
        lambda sizes: {"oft_block_size": fitting_block(sizes.inputs)},
        # On the encoder twice, four and eight times as much are worse.
        (5e-4, 2e-2),
        ("", CONV_OFT),
    ),
    Method(
        "oft-exact",
        "OFT, exact Cayley",
        "OFTConfig",
        lambda sizes: {"oft_block_size": fitting_block(sizes.inputs), "use_cayley_neumann": False},
        # On the encoder eight times as much is worse.
        (5e-4, 2e-2),
        ("", CONV_OFT),
    ),
)
