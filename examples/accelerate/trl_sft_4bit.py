"""The same as trl_sft.py on a base model in 4 bits: nf4, quantised twice.

python examples/accelerate/trl_sft_4bit.py        # a tiny random LLaMA, in seconds, offline; needs bitsandbytes
"""

from __future__ import annotations

import tempfile

import torch
import trl_sft
from tiny import compare, llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def quantised():
    """Return the tiny model in 4 bits, as `from_pretrained` makes it."""
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def train(accelerated: bool) -> list[float]:
    """Train, and return the loss of every step."""
    return trl_sft.train(accelerated, quantised())


def main(arguments: list[str] | None = None) -> dict:
    """Train twice and compare."""
    return compare(train, arguments, __doc__)


if __name__ == "__main__":
    main()
