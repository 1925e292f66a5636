"""Llama-Adapter."""

from __future__ import annotations

from peftk.nn import AdaptionPromptConfig

CASES = {
    "prompts": ("llama", AdaptionPromptConfig, {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"}),
    "prompts, top layer": ("llama_gqa", AdaptionPromptConfig, {"adapter_len": 1, "adapter_layers": 1}),
    "prompts, mistral": (
        "mistral",
        AdaptionPromptConfig,
        {"adapter_len": 3, "adapter_layers": 2, "target_modules": "self_attn"},
    ),
    "prompts, gpt2": ("gpt2", AdaptionPromptConfig, {"adapter_len": 5, "adapter_layers": 2}),
}
