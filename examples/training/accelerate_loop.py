"""A loop with Hugging Face accelerate and OFT: `save_state` to go on from, and the adapter alone to give away.

python examples/training/accelerate_loop.py       # a tiny random LLaMA, in seconds, offline
torchrun --nproc_per_node 2 examples/training/accelerate_loop.py --cpu
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import peftk


def tiny_llama() -> LlamaForCausalLM:
    """Return a tiny random LLaMA; the same one every time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))


def passages(count: int) -> list[torch.Tensor]:
    """Return passages of Python's own documentation, as bytes."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split()).encode("ascii", "replace")
    return list(torch.tensor(list(text[: count * 64])).view(count, 64))


def main(arguments: list[str] | None = None) -> dict:
    """Train, go back to a saved state, train again, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--output", default="adapters/accelerate_loop", help="the folder, which all processes share")
    options = parser.parse_args(arguments)

    accelerator = Accelerator(cpu=options.cpu, gradient_accumulation_steps=2)
    config = peftk.OFTConfig(
        task_type="CAUSAL_LM", oft_block_size=32, use_cayley_neumann=True, target_modules=["q_proj", "v_proj"]
    )
    model = peftk.get_peft_model(tiny_llama(), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=32)
    data = DataLoader(passages(64), batch_size=4)
    model, optimizer, scheduler, data = accelerator.prepare(model, optimizer, scheduler, data)

    def epoch() -> list[float]:
        model.train()
        losses = []
        for ids in data:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    losses = epoch()
    accelerator.save_state(f"{options.output}/state")
    second = epoch()
    accelerator.load_state(f"{options.output}/state")
    resumed = epoch()

    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        f"{options.output}/adapter",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    accelerator.wait_for_everyone()
    sizes = {
        kind: sum(path.stat().st_size for path in Path(options.output, kind).iterdir()) for kind in ("state", "adapter")
    }
    loaded = peftk.PeftModel.from_pretrained(tiny_llama(), f"{options.output}/adapter").to(accelerator.device)
    model.eval()
    ids = next(iter(data))
    with torch.no_grad():
        difference = (loaded(input_ids=ids).logits - model(input_ids=ids).logits).abs().max().item()
    accelerator.print(f"loss: {losses[0]:.4f} at first, {second[-1]:.4f} after two epochs")
    accelerator.print(f"the second epoch again from the saved state: {resumed[-1]:.4f}")
    accelerator.print(
        f"state: {sizes['state']} bytes; adapter: {sizes['adapter']} bytes; outputs differ, loaded: ", end=""
    )
    accelerator.print(f"{difference:.1e}")
    return {
        "losses": [*losses, *second],
        "second": second,
        "resumed": resumed,
        "sizes": sizes,
        "difference": difference,
    }


if __name__ == "__main__":
    main()
