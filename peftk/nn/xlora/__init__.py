"""X-LoRA: LoRA experts under gates that a classifier computes for every token."""

from __future__ import annotations

from .config import XLoraConfig
from .layer import GATED, Gates, XLoraClassifier, XLoraConv, XLoraEmbedding, XLoraLayer, XLoraLinear

__all__ = [
    "GATED",
    "Gates",
    "XLoraClassifier",
    "XLoraConfig",
    "XLoraConv",
    "XLoraEmbedding",
    "XLoraLayer",
    "XLoraLinear",
]
