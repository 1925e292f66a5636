"""A loop of your own with LoRA: gradients of several batches before a step, a checkpoint, and going on from it.

    python examples/training/own_loop.py              # a tiny random LLaMA, in seconds, offline

Of the model a checkpoint holds the adapter alone; of the optimiser it holds what that has of the adapter.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftk

ACCUMULATED = 2  # batches whose gradients are added up before a step


def tiny_llama() -> LlamaForCausalLM:
    """Return a tiny random LLaMA; the same one every time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))


def batches(count: int) -> list[torch.Tensor]:
    """Return batches of texts: passages of Python's own documentation, as bytes."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split()).encode("ascii", "replace")
    return list(torch.tensor(list(text[: count * 4 * 64])).view(count, 4, 64))


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return an optimiser of what is trained: a frozen parameter has no business in it."""
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> list[float]:
    """Train on every batch, and return the loss of every step."""
    model.train()
    losses = []
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss / ACCUMULATED
        loss.backward()
        losses.append(loss.item())
        if len(losses) % ACCUMULATED == 0:
            optimizer.step()
            optimizer.zero_grad()
    return [sum(losses[i : i + ACCUMULATED]) for i in range(0, len(losses), ACCUMULATED)]


def main(arguments: list[str] | None = None) -> dict:
    """Train in one go, and in two with a checkpoint between, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    base, data = tiny_llama(), batches(16)
    config = peftk.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj", "down_proj"])

    model = peftk.get_peft_model(copy.deepcopy(base), config)
    optimizer = optimizer_of(model)
    losses = train(model, optimizer, data[:8])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.save(optimizer.state_dict(), Path(folder, "optimizer.pt"))
        losses += train(model, optimizer, data[8:])

        resumed = peftk.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
        optimizer = optimizer_of(resumed)
        optimizer.load_state_dict(torch.load(Path(folder, "optimizer.pt")))
        files = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
    again = train(resumed, optimizer, data[8:])
    print("losses in one go:           ", " ".join(f"{loss:.4f}" for loss in losses))
    print("and from the checkpoint on: ", " " * 6 * 4 + " ".join(f"{loss:.4f}" for loss in again))
    print("the checkpoint:", ", ".join(f"{name} {size} bytes" for name, size in files.items()))
    return {"losses": losses, "resumed": again, "files": files}


if __name__ == "__main__":
    main()
