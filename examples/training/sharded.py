"""LoRA under FSDP2 on two processes: the base model is sharded, and the adapter alone is saved.

    python examples/training/sharded.py               # a tiny random LLaMA, two processes of this machine, offline

Under `torchrun` each process calls `work` with its own rank, and the rest is the same.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import peftk

RANKS = 2


def tiny_llama() -> LlamaForCausalLM:
    """Return a tiny random LLaMA; the same one in every process."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))


def batches(count: int) -> list[torch.Tensor]:
    """Return batches of texts: passages of Python's own documentation, as bytes."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split()).encode("ascii", "replace")
    return list(torch.tensor(list(text[: count * 4 * 64])).view(count, 4, 64))


def adapted() -> peftk.PeftModel:
    """Return the model with a fresh adapter; the same one in every process."""
    config = peftk.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return peftk.get_peft_model(tiny_llama(), config)


def train(model: torch.nn.Module, data: list[torch.Tensor], rank: int = 0, ranks: int = 1) -> list[float]:
    """Train on this rank's part of every batch, and return the losses of that."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    losses = []
    for ids in data:
        mine = ids.chunk(ranks)[rank]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def work(rank: int, folder: str) -> None:
    """Train as one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        model = adapted()
        # Block by block, and what is left over: so the weights of one block at a time are whole.
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses = train(model, batches(6), rank, RANKS)
        # Every process helps to gather; one of them writes.
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        model.save_pretrained(f"{folder}/adapter", is_main_process=rank == 0, state_dict=state)
        sharded = sum(p.to_local().numel() for p in model.parameters())
        torch.save({"losses": losses, "parameters": sharded}, f"{folder}/rank{rank}")
    finally:
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> dict:
    """Train on two processes and on one, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)
        ranks = [torch.load(f"{folder}/rank{rank}") for rank in range(RANKS)]
        files = {path.name: path.stat().st_size for path in sorted(Path(folder, "adapter").iterdir())}
        loaded = peftk.PeftModel.from_pretrained(tiny_llama(), f"{folder}/adapter")
    losses = [sum(both) / RANKS for both in zip(*(rank["losses"] for rank in ranks), strict=True)]
    alone = adapted()
    whole = train(alone, batches(6))
    ids = batches(1)[0]
    with torch.no_grad():
        ours, theirs = (model.eval()(input_ids=ids).logits for model in (alone, loaded))
    found = {"difference": (ours - theirs).abs().max().item(), "largest": ours.abs().max().item()}
    total = sum(p.numel() for p in alone.parameters())
    print("losses of two processes:", " ".join(f"{loss:.5f}" for loss in losses))
    print("losses of one:          ", " ".join(f"{loss:.5f}" for loss in whole))
    print(f"of {total} parameters the first process holds {ranks[0]['parameters']}")
    print("saved:", ", ".join(f"{name} {size} bytes" for name, size in files.items()), end="; ")
    print(f"outputs differ, loaded, from those of one process: {found['difference']:.1e}")
    return {"losses": losses, "alone": whole, "files": files, "held": ranks[0]["parameters"], "total": total, **found}


if __name__ == "__main__":
    main()
