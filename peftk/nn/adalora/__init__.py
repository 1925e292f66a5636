"""AdaLoRA: low-rank updates in the form of an SVD, whose rank is allocated while training."""

from __future__ import annotations

from .config import AdaLoraConfig
from .conv import AdaLoRAConv
from .linear import AdaLoRALinear

__all__ = ["AdaLoRAConv", "AdaLoRALinear", "AdaLoraConfig"]
