"""LoRA on linear layers, convolutions and embeddings, with DoRA, mixed batches and quantised bases."""

from __future__ import annotations

from .config import LoraConfig, LoraRuntimeConfig
from .conv import LoRAConv
from .embedding import LoRAEmbedding
from .linear import LoRALinear

__all__ = ["LoRAConv", "LoRAEmbedding", "LoRALinear", "LoraConfig", "LoraRuntimeConfig"]
