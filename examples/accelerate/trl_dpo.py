"""Preference optimisation with TRL and LoRA, without and with peftk's kernels.

python examples/accelerate/trl_dpo.py             # a tiny random LLaMA, in seconds, offline
"""

from __future__ import annotations

import tempfile

import peft
from datasets import Dataset
from tiny import compare, llama, texts, tokenizer
from trl import DPOConfig, DPOTrainer

from peftk.integrations.hf_trainer import AccelerateCallback


def train(accelerated: bool) -> list[float]:
    """Train, and return the loss of every step."""
    rows = texts(48)
    pairs = {
        "prompt": [row[:24] for row in rows],
        "chosen": [row[24:56] for row in rows],
        "rejected": [row[56:] * 2 for row in rows],
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=llama(),
            args=DPOConfig(
                output_dir=folder,
                max_steps=6,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict(pairs),
            processing_class=tokenizer(),
            peft_config=peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[AccelerateCallback()] if accelerated else [],
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(arguments: list[str] | None = None) -> dict:
    """Train twice and compare."""
    return compare(train, arguments, __doc__)


if __name__ == "__main__":
    main()
