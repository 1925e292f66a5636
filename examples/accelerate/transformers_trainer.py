"""A transformers `Trainer` and LoHa, without and with peftk's kernels.

python examples/accelerate/transformers_trainer.py    # a tiny random LLaMA, in seconds, offline
"""

from __future__ import annotations

import tempfile

import peft
from datasets import Dataset
from tiny import compare, llama, texts, tokenizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from peftk.integrations.hf_trainer import AccelerateCallback


def train(accelerated: bool) -> list[float]:
    """Train, and return the loss of every step."""
    reader = tokenizer()
    model = peft.get_peft_model(llama(), peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=8,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict(dict(reader(texts(), truncation=True, max_length=64))),
            data_collator=DataCollatorForLanguageModeling(reader, mlm=False),
            callbacks=[AccelerateCallback()] if accelerated else [],
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(arguments: list[str] | None = None) -> dict:
    """Train twice and compare."""
    return compare(train, arguments, __doc__)


if __name__ == "__main__":
    main()
