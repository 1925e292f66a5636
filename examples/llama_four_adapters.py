"""Train four LoRA adapters in one batch: one pass over the base model for four users, each with a text of their own.

    python examples/llama_four_adapters.py                             # a tiny random LLaMA, in seconds, offline
    python examples/llama_four_adapters.py --model HuggingFaceTB/SmolLM2-135M --texts a.txt b.txt c.txt d.txt

`adapter_names` gives every sample of the batch its adapter. A gradient reaches an adapter from its own samples alone,
so that each is trained as it would be alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import peftk


def load(source: str | None):
    """Return a model and its tokenizer: the user's, or a tiny random one that reads bytes."""
    if source:
        return AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    tokenizer = ByT5Tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config), tokenizer


def token_streams(tokenizer, paths: list[str] | None) -> list[torch.Tensor]:
    """Return the tokens of each text file, or of four parts of Python's own documentation, in one row each."""
    if paths:
        texts = [Path(path).read_text() for path in paths]
    else:
        from pydoc_data.topics import topics

        text = " ".join(" ".join(topics.values()).split())
        texts = [text[start : start + 15_000] for start in range(0, 60_000, 15_000)]
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]


def passages(stream: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Return random passages of a text, (count, length)."""
    starts = torch.randint(len(stream) - length, (count, 1))
    return stream[starts + torch.arange(length)]


def losses_of(model: torch.nn.Module, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Return the loss of every sample, each with its own adapter."""
    logits = model(input_ids=ids, adapter_names=names).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
    return losses.mean(1)


def main(arguments: list[str] | None = None) -> dict:
    """Train the adapters, hold one step to that of each alone, save them, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model (default: a tiny random LLaMA)")
    parser.add_argument("--texts", nargs="+", help="a text file for each adapter (default: Python's documentation)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=3, help="samples of each adapter")
    parser.add_argument("--length", type=int, default=48, help="tokens of a passage")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--output", default="adapters/llama_four_adapters")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    base, tokenizer = load(options.model)
    streams = token_streams(tokenizer, options.texts)
    users = [f"user{number}" for number in range(len(streams))]
    # Ranks and scales may differ.
    configs = [
        peftk.LoraConfig(task_type="CAUSAL_LM", r=4 + 2 * n, use_rslora=n == 1, target_modules="all-linear")
        for n in range(len(users))
    ]
    model = peftk.get_peft_model(base, configs[0], users[0])
    for user, config in zip(users[1:], configs[1:], strict=True):
        model.add_adapter(user, config)
    model.set_requires_grad(users)
    model.print_trainable_parameters()

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.rate)
    names = [user for user in users for _ in range(options.batch)]
    model.train()
    losses = {user: [] for user in users}
    for _ in tqdm(range(options.steps), desc="four adapters"):
        ids = torch.cat([passages(stream, options.batch, options.length) for stream in streams])
        found = losses_of(model, ids, names)
        found.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for user, loss in zip(users, found.detach().view(len(users), -1).mean(1).tolist(), strict=True):
            losses[user].append(loss)
    for user, values in losses.items():
        print(f"{user}: loss {values[0]:.3f} at the first step, {values[-1]:.3f} at the last")

    together = gradients(model, losses_of(model, ids, names).sum())
    alone = {}
    for user, part in zip(users, ids.split(options.batch), strict=True):
        alone |= gradients(model, losses_of(model, part, [user] * options.batch).sum(), f".{user}.")
    expected = torch.cat([gradient.flatten() for gradient in alone.values()])
    found = torch.cat([together[name].flatten() for name in alone])
    apart = ((found - expected).norm() / expected.norm()).item()
    print(f"gradients of one batch are those of each adapter alone, to {apart:.1e}")
    model.eval().save_pretrained(options.output)
    print(f"saved to {options.output}, one folder for each adapter")
    return {"model": model, "losses": losses, "apart": apart, "gradients": len(alone)}


def gradients(model: torch.nn.Module, loss: torch.Tensor, part: str = "") -> dict[str, torch.Tensor]:
    """Return the gradients of the parameters whose names have a part, by name."""
    model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and part in n}
    model.zero_grad()
    return found


if __name__ == "__main__":
    main()
