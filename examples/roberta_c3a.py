"""Fine-tune RoBERTa for classification with C3A: block-circulant updates, large learning rate, block sizes by layer.

    python examples/roberta_c3a.py                                          # a tiny random model, in seconds, offline
    python examples/roberta_c3a.py --model FacebookAI/roberta-base --texts labelled.tsv --block 256 --steps 500

C3A divides its update by the input size of the layer, so it wants a learning rate near 1e-1. A block size has to divide
both sizes of a layer: `block_size_pattern` gives the layers that it does not fit a size of their own. The built-in
task: is a piece of text prose or code? A file of texts has one example a line: label, a tab, text.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, ByT5Tokenizer, RobertaConfig, RobertaForSequenceClassification

import peftk


def load(source: str | None, classes: int):
    """Return a model and its tokenizer: the user's, or a tiny random one that reads bytes."""
    if source:
        model = RobertaForSequenceClassification.from_pretrained(
            source, num_labels=classes, ignore_mismatched_sizes=True
        )
        return model, AutoTokenizer.from_pretrained(source)
    tokenizer = ByT5Tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=80,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=classes,
    )
    return RobertaForSequenceClassification(config), tokenizer


def examples(path: str | None) -> tuple[list[str], torch.Tensor, list[str]]:
    """Return texts, labels and the names of the classes."""
    if path:
        pairs = [line.split("\t", 1) for line in Path(path).read_text().splitlines() if "\t" in line]
        names = sorted({label for label, _ in pairs})
        return [text for _, text in pairs], torch.tensor([names.index(label) for label, _ in pairs]), names
    from pydoc_data.topics import topics

    prose = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    code = [part for module in (argparse, inspect) for part in inspect.getsource(module).split("\n\n")]
    prose, code = ([part for part in side if len(part) > 60][:200] for side in (prose, code))
    return prose + code, torch.tensor([0] * len(prose) + [1] * len(code)), ["prose", "code"]


def main(arguments: list[str] | None = None) -> dict:
    """Train the adapter, save it, load it again, merge it, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a RoBERTa model (default: a tiny random one)")
    parser.add_argument("--texts", help="file of examples: label, a tab, text (default: prose or code)")
    parser.add_argument("--block", type=int, default=32, help="block size of the attention layers")
    parser.add_argument("--dense-block", type=int, default=16, help="block size of the layers called dense")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--rate", type=float, default=1e-1, help="learning rate of the adapter")
    parser.add_argument("--head-rate", type=float, default=1e-2, help="learning rate of the classifier")
    parser.add_argument("--output", default="adapters/roberta_c3a")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    texts, labels, classes = examples(options.texts)
    base, tokenizer = load(options.model, len(classes))
    config = peftk.C3AConfig(
        task_type="SEQ_CLS",
        block_size=options.block,
        block_size_pattern={"dense": options.dense_block},
        target_modules=r".*\.encoder\..*\.(query|key|value|dense)",
    )
    model = peftk.get_peft_model(copy.deepcopy(base), config)
    model.print_trainable_parameters()

    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    adapter = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    groups = [{"params": adapter, "lr": options.rate}, {"params": head, "lr": options.head_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    batch = tokenizer(texts, truncation=True, max_length=options.length, padding=True, return_tensors="pt")
    model.train()
    losses = []
    for _ in tqdm(range(options.steps), desc="C3A"):
        chosen = torch.randint(len(texts), (options.batch,))
        part = {name: batch[name][chosen] for name in ("input_ids", "attention_mask")}
        loss = model(**part, labels=labels[chosen]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")

    model.eval()
    model.save_pretrained(options.output)
    loaded = peftk.PeftModel.from_pretrained(copy.deepcopy(base), options.output)
    part = {name: batch[name][:16] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = (m(**part).logits for m in (model, loaded))
        flat = loaded.merge_and_unload()(**part).logits
    differences = {"loaded": (theirs - ours).abs().max().item(), "merged": (flat - ours).abs().max().item()}
    print(f"saved to {options.output}; outputs differ, loaded: {differences['loaded']:.1e}, ", end="")
    print(f"merged: {differences['merged']:.1e}")
    return {"losses": losses, "differences": differences, "largest": ours.abs().max().item(), "model": model}


if __name__ == "__main__":
    main()
