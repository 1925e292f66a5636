"""Mix two saved LoRA adapters with X-LoRA: a small classifier decides, token by token, how much each expert says.

    python examples/x_lora.py                                          # a tiny random LLaMA, in seconds, offline
    python examples/x_lora.py --model HuggingFaceTB/SmolLM2-135M --experts prose=adapters/a code=adapters/b --steps 300

Without --experts two are trained first, on prose and on code, and saved. Then they are frozen, and only the classifier
is trained, on both kinds of text.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import peftk


def load(source: str | None):
    """Return a model and its tokenizer: the user's, or a tiny random one that reads bytes."""
    if source:
        # X-LoRA runs the model twice a forward pass, so that a cache of keys and values would be wrong.
        model = AutoModelForCausalLM.from_pretrained(source)
        model.config.use_cache = False
        return model, AutoTokenizer.from_pretrained(source)
    tokenizer = ByT5Tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        use_cache=False,
    )
    return LlamaForCausalLM(config), tokenizer


def token_streams(tokenizer) -> dict[str, torch.Tensor]:
    """Return the tokens of Python's own documentation, and of two of its modules."""
    from pydoc_data.topics import topics

    prose = " ".join(" ".join(topics.values()).split())[:60_000]
    code = inspect.getsource(argparse) + inspect.getsource(inspect)
    return {name: torch.tensor(tokenizer(text)["input_ids"]) for name, text in (("prose", prose), ("code", code))}


def train(model, streams: list[torch.Tensor], options: argparse.Namespace, name: str) -> list[float]:
    """Train what is trainable on passages of all streams, and return the losses."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.rate)
    model.train()
    losses = []
    for _ in tqdm(range(options.steps), desc=name):
        ids = torch.cat([passages(tokens, options.batch // len(streams), options.length) for tokens in streams])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{name}: loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    return losses


def passages(tokens: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Return passages of a stream that start anywhere: (count, length)."""
    return tokens[torch.randint(len(tokens) - length, (count, 1)) + torch.arange(length)]


def main(arguments: list[str] | None = None) -> dict:
    """Train two experts and the classifier, save, load again, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model (default: a tiny random LLaMA)")
    parser.add_argument("--experts", nargs="+", metavar="NAME=FOLDER", help="saved LoRA adapters (default: train two)")
    parser.add_argument("--steps", type=int, default=40, help="training steps of each expert and of the classifier")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=48, help="tokens of a passage")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--output", default="adapters/x_lora")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    base, tokenizer = load(options.model)
    streams = token_streams(tokenizer)
    if options.experts:
        experts = dict(pair.split("=", 1) for pair in options.experts)
    else:
        experts = {}
        for name, tokens in streams.items():
            config = peftk.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
            expert = peftk.get_peft_model(copy.deepcopy(base), config)
            train(expert, [tokens], options, f"expert on {name}")
            experts[name] = str(Path(options.output) / f"expert_{name}")
            expert.save_pretrained(experts[name])

    config = peftk.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=experts, xlora_depth=2, xlora_size=32
    )
    model = peftk.get_peft_model(copy.deepcopy(base), config)
    model.print_trainable_parameters()
    losses = train(model, list(streams.values()), options, "classifier")

    model.eval()
    folder = str(Path(options.output) / "mixture")
    model.save_pretrained(folder)
    loaded = peftk.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    weights = {}
    with torch.no_grad():
        for name, tokens in streams.items():
            ids = passages(tokens, 8, options.length)
            ours, theirs = model(ids).logits, loaded(ids).logits
            # (passages, tokens, layers, experts)
            weights[name] = dict(zip(experts, model.get_latest_scalings().mean((0, 1, 2)).tolist(), strict=True))
            shares = ", ".join(f"{expert} {share:.0%}" for expert, share in weights[name].items())
            print(f"on {name}: weight of each expert: {shares}")
    difference = (theirs - ours).abs().max().item()
    print(f"saved to {folder}; loaded again, its outputs differ by {difference:.1e}")
    return {"losses": losses, "weights": weights, "difference": difference, "model": model}


if __name__ == "__main__":
    main()
