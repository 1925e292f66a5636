"""A sentence encoder of sentence-transformers and LoKr: training, the adapter alone, and the merged encoder.

    python examples/training/sentence_embeddings.py   # a tiny random BERT, in seconds, offline

The adapter goes into the encoder that sentence-transformers holds, layer by layer, so that nothing else changes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from transformers import BertConfig, BertModel, ByT5Tokenizer

import peftk


def encoder(folder: str) -> SentenceTransformer:
    """Return a tiny random encoder that reads bytes; the same one every time."""
    reader = ByT5Tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(reader), **sizes)).save_pretrained(folder)
    reader.save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(folder, max_seq_length=64), Pooling(64)], device="cpu")


def passages(count: int) -> list[str]:
    """Return passages of Python's own documentation."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split())
    return [text[80 * i : 80 * i + 72] for i in range(count)]


def main(arguments: list[str] | None = None) -> dict:
    """Train, save, load and merge, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    rows = passages(48)
    config = peftk.LoKrConfig(r=4, target_modules=["query", "value", "dense"], task_type="FEATURE_EXTRACTION")
    with tempfile.TemporaryDirectory() as folder:
        model = encoder(f"{folder}/base")
        adapted = peftk.get_peft_model(model[0].auto_model, config)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                max_steps=18,
                per_device_train_batch_size=8,
                learning_rate=3e-2,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict(
                {"anchor": [row[:60] for row in rows], "positive": [row[12:] for row in rows]}
            ),
            loss=MultipleNegativesRankingLoss(model),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

        adapted.save_pretrained(f"{folder}/adapter")
        expected = model.encode(rows[:4], convert_to_tensor=True)
        other = encoder(f"{folder}/base")
        plain = other.encode(rows[:4], convert_to_tensor=True)
        peftk.PeftModel.from_pretrained(other[0].auto_model, f"{folder}/adapter")
        loaded = other.encode(rows[:4], convert_to_tensor=True)

        adapted.merge_and_unload()
        model.save_pretrained(f"{folder}/merged")
        merged = SentenceTransformer(f"{folder}/merged", device="cpu").encode(rows[:4], convert_to_tensor=True)
        size = sum(path.stat().st_size for path in Path(folder, "adapter").iterdir())
    differences = {
        "base": (plain - expected).abs().max().item(),
        "loaded": (loaded - expected).abs().max().item(),
        "merged": (merged - expected).abs().max().item(),
    }
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; the adapter has {size} bytes")
    print("embeddings differ from those trained:", ", ".join(f"{name} {d:.1e}" for name, d in differences.items()))
    return {"losses": losses, "differences": differences, "largest": expected.abs().max().item(), "size": size}


if __name__ == "__main__":
    main()
