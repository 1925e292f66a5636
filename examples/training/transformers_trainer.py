"""A transformers `Trainer` with AdaLoRA: adapters in its checkpoints, resuming, the best of them, and pruning.

    python examples/training/transformers_trainer.py  # a tiny random LLaMA, in seconds, offline

`AdapterTrainerMixin` makes the Trainer keep adapters instead of whole models, and prunes AdaLoRA adapters as it trains.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import peftk
from peftk.models.trainer import AdapterTrainerMixin

STEPS = 24


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """A Trainer of adapters."""


def adapted() -> peftk.PeftModel:
    """Return a tiny random LLaMA with a fresh adapter; the same one every time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    config = peftk.AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=8,
        target_r=4,
        tinit=4,
        tfinal=8,
        deltaT=2,
        total_step=STEPS,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "down_proj"],
    )
    return peftk.get_peft_model(base, config)


def passages(count: int) -> list[dict[str, torch.Tensor]]:
    """Return passages of Python's own documentation, as bytes."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split()).encode("ascii", "replace")
    return [{"input_ids": row, "labels": row} for row in torch.tensor(list(text[: count * 64])).view(count, 64)]


def trainer_of(folder: str, steps: int) -> AdapterTrainer:
    """Return a trainer of a fresh adapter that saves and evaluates every eight steps."""
    rows = passages(80)
    options = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=8,
        eval_steps=8,
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    return AdapterTrainer(adapted(), options, train_dataset=rows[:64], eval_dataset=rows[64:])


def main(arguments: list[str] | None = None) -> dict:
    """Train, go on from a checkpoint, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        first = trainer_of(folder, 16)
        first.train()
        trainer = trainer_of(folder, STEPS)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-16")
        files = sorted(path.name for path in Path(trainer.state.best_model_checkpoint).iterdir())
        trainer.save_model(f"{folder}/final")
        loaded = peftk.PeftModel.from_pretrained(adapted().unload(), f"{folder}/final")
    ids = passages(4)[0]["input_ids"][None]
    with torch.no_grad():
        ours, theirs = (m.to("cpu").eval()(input_ids=ids).logits for m in (trainer.model, loaded))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    scores = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    ranks = {name: sum(kept) for name, kept in loaded.peft_config["default"].rank_pattern.items()}
    difference = (ours - theirs).abs().max().item()
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    print("on other texts, every eight steps:", " ".join(f"{score:.3f}" for score in scores))
    print(f"best: {Path(trainer.state.best_model_checkpoint).name} with {', '.join(files)}")
    print(f"ranks that are left: {list(ranks.values())}; outputs differ, loaded: {difference:.1e}")
    return {"losses": losses, "scores": scores, "files": files, "ranks": ranks, "difference": difference}


if __name__ == "__main__":
    main()
