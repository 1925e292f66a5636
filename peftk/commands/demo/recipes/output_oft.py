"""OFT and BOFT on the output."""

from __future__ import annotations

from ._recipe import Elsewhere

ELSEWHERE = Elsewhere(
    "output_oft",
    "OutputOFTConfig",
    "Hugging Face PEFT rotates inputs alone, so that there is nothing to compare rotations of outputs with; "
    "see examples/unet_loha_lokr.py",
)
