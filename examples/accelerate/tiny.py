"""What the scripts of this folder share: tiny random models that read bytes, texts, and a comparison of two runs."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

# Nothing here needs the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM


def tokenizer() -> ByT5Tokenizer:
    """Return a tokenizer that reads bytes, and needs no file."""
    made = ByT5Tokenizer()
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def llama() -> LlamaForCausalLM:
    """Return a tiny random LLaMA; the same one every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(ByT5Tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def texts(count: int = 64) -> list[str]:
    """Return passages of Python's own documentation."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split())
    return [text[80 * i : 80 * i + 72] for i in range(count)]


def compare(train: Callable[[bool], list[float]], arguments: list[str] | None, description: str | None) -> dict:
    """Run a training script without and with peftk, print both losses, and return them.

    Args:
        train: The script: takes whether to accelerate, and returns the loss of every step.
        arguments: The command line; None for that of the process.
        description: What `--help` says.
    """
    argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    found, seconds = {}, {}
    for name, accelerated in (("PEFT", False), ("PEFT with peftk", True)):
        torch.manual_seed(1)
        start = time.perf_counter()
        found[name] = train(accelerated)
        seconds[name] = time.perf_counter() - start
    print("step  " + "  ".join(f"{name:>15}" for name in found))
    for step, losses in enumerate(zip(*found.values(), strict=True)):
        print(f"{step:4}  " + "  ".join(f"{loss:15.6f}" for loss in losses))
    return {"losses": found}
