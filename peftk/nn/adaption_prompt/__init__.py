"""Llama-Adapter: learned prompts that the last attention layers of a decoder look at, behind a gate."""

from __future__ import annotations

from .attention import AdaptedAttention
from .config import AdaptionPromptConfig

__all__ = ["AdaptedAttention", "AdaptionPromptConfig"]
