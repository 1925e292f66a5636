"""Fine-tune LLaMA (or Mistral, or GPT-2) with adaption prompts: learned vectors that the top layers attend to.

    python examples/llama_adaption_prompt.py                              # a tiny random LLaMA, in seconds, offline
    python examples/llama_adaption_prompt.py --model HuggingFaceTB/SmolLM2-135M --layers 28 --text notes.txt --steps 300

A gate that starts at zero lets the prompts in, so that a fresh adapter changes no bit of the output. There is no weight
to merge them into: they stay beside the model.
"""

from __future__ import annotations

import argparse
import copy
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


def token_stream(tokenizer, path: str | None) -> torch.Tensor:
    """Return the tokens of a text file, or of Python's own documentation, in one row."""
    if path:
        text = Path(path).read_text()
    else:
        from pydoc_data.topics import topics

        text = " ".join(" ".join(topics.values()).split())[:60_000]
    return torch.tensor(tokenizer(text)["input_ids"])


def main(arguments: list[str] | None = None) -> dict:
    """Train the prompts, save them, load them again, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model (default: a tiny random LLaMA)")
    parser.add_argument("--text", help="text file to train on (default: Python's documentation)")
    parser.add_argument("--prompt", type=int, default=10, help="learned vectors of a layer")
    parser.add_argument("--layers", type=int, default=2, help="layers that get a prompt, counted from the last")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=48, help="tokens of a passage")
    parser.add_argument("--rate", type=float, default=5e-2, help="learning rate")
    parser.add_argument("--output", default="adapters/llama_adaption_prompt")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    base, tokenizer = load(options.model)
    config = peftk.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=options.prompt, adapter_layers=options.layers
    )
    tokens = token_stream(tokenizer, options.text)
    passage = tokens[None, : options.length]
    with torch.no_grad():
        plain = base.eval()(passage).logits
        model = peftk.get_peft_model(copy.deepcopy(base), config)
        changed = (model.eval()(passage).logits - plain).abs().max().item()
    model.print_trainable_parameters()
    print(f"a fresh adapter changes the outputs by {changed:.1e}")

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.rate)
    model.train()
    losses = []
    for _ in tqdm(range(options.steps), desc="adaption prompts"):
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
        ours, theirs = (m(passage).logits for m in (model, loaded))
        with model.disable_adapter():
            without = model(passage).logits
    difference = (theirs - ours).abs().max().item()
    print(f"saved to {options.output}; loaded again, its outputs differ by {difference:.1e}")
    gates = {name: p.item() for name, p in model.named_parameters() if "gate" in name and p.requires_grad}
    for name, gate in gates.items():
        print(f"  {name}: {gate:+.4f}")
    disabled = (without - plain).abs().max().item()
    return {"losses": losses, "fresh": changed, "difference": difference, "disabled": disabled, "gates": gates}


if __name__ == "__main__":
    main()
