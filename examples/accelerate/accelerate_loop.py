"""A loop of one's own with Hugging Face accelerate and BOFT, without and with peftk's kernels.

    python examples/accelerate/accelerate_loop.py     # a tiny random LLaMA, in seconds, offline

The line that peftk adds is `peftk.accelerate(model)`, before or after `prepare`.
"""

from __future__ import annotations

import peft
import torch
from accelerate import Accelerator
from tiny import compare, llama, texts, tokenizer
from torch.utils.data import DataLoader

import peftk


def train(accelerated: bool) -> list[float]:
    """Train, and return the loss of every step."""
    reader = tokenizer()
    model = peft.get_peft_model(llama(), peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj", "v_proj"]))
    if accelerated:
        print(peftk.accelerate(model))
    accelerator = Accelerator(cpu=True)
    data = DataLoader(texts(32), batch_size=4, collate_fn=lambda rows: reader(rows, return_tensors="pt", padding=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    model.train()
    losses = []
    for batch in data:
        loss = model(**batch, labels=batch["input_ids"]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> dict:
    """Train twice and compare."""
    return compare(train, arguments, __doc__)


if __name__ == "__main__":
    main()
