"""Supervised fine-tuning with TRL and OFT on all linear layers, without and with peftk's kernels.

    python examples/accelerate/trl_sft.py             # a tiny random LLaMA, in seconds, offline

The line that peftk adds is `callbacks=[AccelerateCallback()]`.
"""

from __future__ import annotations

import tempfile

import peft
from datasets import Dataset
from tiny import compare, llama, texts, tokenizer
from trl import SFTConfig, SFTTrainer

from peftk.integrations.hf_trainer import AccelerateCallback


def train(accelerated: bool, model=None, steps: int = 8) -> list[float]:
    """Train, and return the loss of every step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model or llama(),
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                logging_steps=1,
                max_length=64,
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict({"text": texts()}),
            processing_class=tokenizer(),
            peft_config=peft.OFTConfig(
                oft_block_size=32,
                use_cayley_neumann=True,
                target_modules="all-linear",
                bias="none",
                task_type="CAUSAL_LM",
            ),
            callbacks=[AccelerateCallback()] if accelerated else [],
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(arguments: list[str] | None = None) -> dict:
    """Train twice and compare."""
    return compare(train, arguments, __doc__)


if __name__ == "__main__":
    main()
