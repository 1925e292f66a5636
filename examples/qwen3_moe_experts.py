"""Fine-tune the experts of a mixture-of-experts language model with LoRA, which "all-linear" does not reach.

    python examples/qwen3_moe_experts.py                               # a tiny random Qwen3-MoE, in seconds, offline
    python examples/qwen3_moe_experts.py --model Qwen/Qwen3-30B-A3B --text notes.txt --steps 300 --rate 2e-4

Experts are stacks of weights, not layers. `target_parameters` names them; each expert gets factors of its own, which
run beside the products of the tokens that the router sends it.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import peftk

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def load(source: str | None):
    """Return a model and its tokenizer: the user's, or a tiny random one that reads bytes."""
    if source:
        return AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    tokenizer = ByT5Tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    return Qwen3MoeForCausalLM(config), tokenizer


def token_stream(tokenizer, path: str | None) -> torch.Tensor:
    """Return the tokens of a text file, or of Python's own documentation, in one row."""
    if path:
        text = Path(path).read_text()
    else:
        from pydoc_data.topics import topics

        text = " ".join(" ".join(topics.values()).split())[:60_000]
    return torch.tensor(tokenizer(text)["input_ids"])


def main(arguments: list[str] | None = None) -> dict:
    """Train the adapter, save it, load it again, merge it, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a mixture of experts (default: a tiny random Qwen3-MoE)")
    parser.add_argument("--text", help="text file to train on (default: Python's documentation)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=48, help="tokens of a passage")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--output", default="adapters/qwen3_moe_experts")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    base, tokenizer = load(options.model)
    config = peftk.LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=STACKS,
    )
    tokens = token_stream(tokenizer, options.text)
    passage = tokens[None, : options.length]
    model = peftk.get_peft_model(copy.deepcopy(base), config)
    model.print_trainable_parameters()

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.rate)
    model.train()
    losses = []
    for _ in tqdm(range(options.steps), desc="LoRA"):
        starts = torch.randint(len(tokens) - options.length, (options.batch, 1))
        ids = tokens[starts + torch.arange(options.length)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")

    model.eval()
    model.save_pretrained(options.output)
    loaded = peftk.PeftModel.from_pretrained(copy.deepcopy(base), options.output)
    with torch.no_grad():
        ours, theirs = (m.eval()(passage).logits for m in (model, loaded))
        flat = loaded.merge_and_unload()(passage).logits
    differences = {"loaded": (theirs - ours).abs().max().item(), "merged": (flat - ours).abs().max().item()}
    print(f"saved to {options.output}; outputs differ, loaded: {differences['loaded']:.1e}, ", end="")
    print(f"merged: {differences['merged']:.1e}")
    return {"model": model, "losses": losses, "differences": differences, "largest": ours.abs().max().item()}


if __name__ == "__main__":
    main()
