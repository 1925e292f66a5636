"""A sentence encoder of sentence-transformers and LoKr, without and with peftk's kernels.

python examples/accelerate/sentence_embeddings.py     # a tiny random BERT, in seconds, offline
"""

from __future__ import annotations

import tempfile

import peft
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from tiny import compare, texts, tokenizer
from transformers import BertConfig, BertModel

from peftk.integrations.hf_trainer import AccelerateCallback


def encoder(folder: str) -> SentenceTransformer:
    """Return a tiny random encoder that reads bytes."""
    reader = tokenizer()
    config = BertConfig(
        vocab_size=len(reader), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    reader.save_pretrained(folder)
    transformer = Transformer(folder, max_seq_length=64)
    return SentenceTransformer(modules=[transformer, Pooling(64)], device="cpu")


def train(accelerated: bool) -> list[float]:
    """Train, and return the loss of every step."""
    rows = texts(48)
    with tempfile.TemporaryDirectory() as folder:
        model = encoder(folder)
        model.add_adapter(
            peft.LoKrConfig(r=4, target_modules=["query", "value", "dense"], task_type="FEATURE_EXTRACTION")
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                max_steps=6,
                per_device_train_batch_size=8,
                learning_rate=1e-2,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict(
                {"anchor": [row[:36] for row in rows], "positive": [row[36:] for row in rows]}
            ),
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[AccelerateCallback()] if accelerated else [],
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(arguments: list[str] | None = None) -> dict:
    """Train twice and compare."""
    return compare(train, arguments, __doc__)


if __name__ == "__main__":
    main()
