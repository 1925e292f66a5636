"""Llama-Adapter."""

from __future__ import annotations

from ._recipe import Elsewhere

ELSEWHERE = Elsewhere(
    "adaption_prompt",
    "AdaptionPromptConfig",
    "Llama-Adapter's prompts are for the attention of LLaMA, Mistral and GPT-2, which an encoder has not; "
    "see examples/llama_adaption_prompt.py",
)
