"""Fine-tune a BERT masked language model: LoRA on query and value, LoRA on every linear layer, then AdaLoRA.

    python examples/bert_masked_lm.py                                        # a tiny random model, in seconds, offline
    python examples/bert_masked_lm.py --model bert-base-uncased --text notes.txt --steps 500 --rate 1e-3

AdaLoRA moves rank to the layers where it counts: it starts with eight everywhere and ends with four on average. Every
adapter's parameters are printed with their shapes and whether they are trained: names and shapes are those of Hugging
Face PEFT, so optimiser groups, sharding policies and scripts that match on names keep working.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, ByT5Tokenizer

import peftk


def adapters(steps: int) -> dict[str, peftk.PeftConfig]:
    """Return the configurations that are tried in turn."""
    return {
        "LoRA on query and value": peftk.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]),
        "LoRA on every linear layer of a block": peftk.LoraConfig(
            r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"]
        ),
        "AdaLoRA on query and value": peftk.AdaLoraConfig(
            init_r=8,
            target_r=4,
            tinit=steps // 5,
            tfinal=steps // 5,
            total_step=steps,
            lora_alpha=16,
            target_modules=["query", "value"],
        ),
    }


def load(source: str | None):
    """Return a model and its tokenizer: the user's, or a tiny random one that reads bytes."""
    if source:
        return BertForMaskedLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    tokenizer = ByT5Tokenizer(mask_token="<extra_id_0>")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    return BertForMaskedLM(config), tokenizer


def passages(path: str | None) -> list[str]:
    """Return the lines of a text file, or paragraphs of Python's own documentation."""
    if path:
        return [line for line in Path(path).read_text().splitlines() if line.strip()]
    from pydoc_data.topics import topics

    paragraphs = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    return [part for part in paragraphs if len(part) > 60][:512]


def masked_batch(tokenizer, texts: list[str], length: int) -> dict[str, torch.Tensor]:
    """Hide 15 % of the tokens; the model is asked for those only."""
    batch = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
    hidden = (torch.rand(batch["input_ids"].shape) < 0.15) & batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~hidden, -100)
    ids = batch["input_ids"].masked_fill(hidden, tokenizer.mask_token_id)
    return {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": labels}


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Train each adapter, save it, load it again, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a BERT masked language model (default: a tiny random one)")
    parser.add_argument("--text", help="text file, one passage a line (default: Python's documentation)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=48, help="tokens of a passage")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--output", default="adapters/bert_masked_lm")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    base, tokenizer = load(options.model)
    texts = passages(options.text)
    results = {}
    for name, config in adapters(options.steps).items():
        model = peftk.get_peft_model(copy.deepcopy(base), config)
        print(f"\n{name}")
        for key, parameter in model.named_parameters():
            if parameter.requires_grad or "_E." in key or "ranknum" in key:
                print(f"  {key}  {tuple(parameter.shape)}  {'trained' if parameter.requires_grad else 'frozen'}")
        model.print_trainable_parameters()

        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.rate)
        model.train()
        losses = []
        progress = tqdm(range(options.steps), desc=name)
        for step in progress:
            first = step * options.batch % len(texts)
            loss = model(**masked_batch(tokenizer, texts[first : first + options.batch], options.length)).loss
            if config.peft_type == "ADALORA":
                loss = loss + model.orthogonality_loss()
            loss.backward()
            optimizer.step()
            if config.peft_type == "ADALORA":
                model.update_and_allocate(step + 1)  # after the step, while the gradients are there
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}")

        for key, parameter in model.named_parameters():
            if "lora_E" in key:
                print(f"  rank {int((parameter != 0).sum())} of {len(parameter)}: {key.partition('.lora_E')[0]}")
        folder = str(Path(options.output) / config.peft_type.value.lower() / str(len(results)))
        model.save_pretrained(folder)
        loaded = peftk.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        batch = tokenizer(texts[:4], truncation=True, max_length=options.length, padding=True, return_tensors="pt")
        with torch.no_grad():
            difference = (model.eval()(**batch).logits - loaded(**batch).logits).abs().max().item()
        print(f"saved to {folder}; loaded again, its outputs differ by {difference:.1e}")
        results[name] = {"config": config, "model": model, "base": base, "losses": losses, "difference": difference}
    return results


if __name__ == "__main__":
    main()
