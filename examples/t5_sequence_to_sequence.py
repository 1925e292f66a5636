"""Fine-tune T5 or mT0 (sequence to sequence) with LoRA on the query and value projections, merge, and generate.

    python examples/t5_sequence_to_sequence.py                         # a tiny random model, in seconds, offline
    python examples/t5_sequence_to_sequence.py --model bigscience/mt0-small --pairs pairs.tsv --steps 500 --rate 1e-3

The built-in task: name the mood of a short review; on it the tiny model learns the letters of the answers, no
more. A file of pairs has one example a line: source, a tab, target.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer, T5Config, T5ForConditionalGeneration

import peftk


def load(source: str | None):
    """Return a model and its tokenizer: the user's, or a tiny random one that reads bytes."""
    if source:
        return AutoModelForSeq2SeqLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    tokenizer = ByT5Tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config), tokenizer


def examples(path: str | None) -> list[tuple[str, str]]:
    """Return pairs of source and target text."""
    if path:
        return [tuple(line.split("\t", 1)) for line in Path(path).read_text().splitlines() if "\t" in line]
    words = {"good": ("lovely", "brilliant", "superb"), "bad": ("dreadful", "boring", "awful")}
    things = ("film", "book", "meal", "concert", "museum")
    return [(f"a {word} {thing}", mood) for mood, all_words in words.items() for word in all_words for thing in things]


def main(arguments: list[str] | None = None) -> dict:
    """Train the adapter, save it, load it again, merge it, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a T5-like model (default: a tiny random one)")
    parser.add_argument("--pairs", help="file of pairs: source, a tab, target (default: the mood of short reviews)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--rate", type=float, default=2e-2, help="learning rate")
    parser.add_argument("--output", default="adapters/t5_sequence_to_sequence")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    base, tokenizer = load(options.model)
    config = peftk.LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, lora_alpha=32, target_modules=["q", "v"])
    model = peftk.get_peft_model(copy.deepcopy(base), config)
    model.print_trainable_parameters()

    pairs = examples(options.pairs)
    loader = torch.utils.data.DataLoader(pairs, options.batch, shuffle=True, collate_fn=lambda pairs: pairs)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.rate)
    model.train()
    losses = []
    for _ in tqdm(range(options.steps), desc="LoRA"):
        sources, targets = zip(*next(batches), strict=True)
        batch = tokenizer(list(sources), padding=True, truncation=True, return_tensors="pt")
        labels = tokenizer(list(targets), padding=True, truncation=True, return_tensors="pt")["input_ids"]
        labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")

    model.eval()
    model.save_pretrained(options.output)
    loaded = peftk.PeftModel.from_pretrained(copy.deepcopy(base), options.output)
    batch = tokenizer([pairs[0][0]], return_tensors="pt")
    start = torch.full((1, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        ours, theirs = (m(**batch, decoder_input_ids=start).logits for m in (model, loaded))
        merged = loaded.merge_and_unload()  # a plain transformers model
        flat = merged(**batch, decoder_input_ids=start).logits
        written = merged.generate(**batch, max_new_tokens=8, do_sample=False)
    differences = {"loaded": (theirs - ours).abs().max().item(), "merged": (flat - ours).abs().max().item()}
    print(f"saved to {options.output}; outputs differ, loaded: {differences['loaded']:.1e}, ", end="")
    print(f"merged: {differences['merged']:.1e}")
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    print(f"it writes {text!r} for {pairs[0][0]!r}; the example says {pairs[0][1]!r}")
    return {"losses": losses, "differences": differences, "largest": ours.abs().max().item()}


if __name__ == "__main__":
    main()
