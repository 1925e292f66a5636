"""LoRA with DoRA's magnitudes on a base model in 4 bits (bitsandbytes): training, loading, and a dense merged model.

python examples/training/quantised_base.py        # a tiny random LLaMA, in seconds, offline, without a GPU
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import peftk


def batches(count: int) -> list[torch.Tensor]:
    """Return batches of texts: passages of Python's own documentation, as bytes."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split()).encode("ascii", "replace")
    return list(torch.tensor(list(text[: count * 4 * 64])).view(count, 4, 64))


def main(arguments: list[str] | None = None) -> dict:
    """Train, load and merge, and return what the test looks at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(f"{folder}/base")

        def quantised() -> torch.nn.Module:
            how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
            return AutoModelForCausalLM.from_pretrained(f"{folder}/base", quantization_config=how, device_map="cpu")

        base = peftk.prepare_model_for_kbit_training(quantised())
        config = peftk.LoraConfig(task_type="CAUSAL_LM", r=8, use_dora=True, target_modules=["q_proj", "v_proj"])
        model = peftk.get_peft_model(base, config)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        losses = []
        model.train()
        for ids in batches(12):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

        model.eval()
        model.save_pretrained(f"{folder}/adapter")
        loaded = peftk.PeftModel.from_pretrained(quantised(), f"{folder}/adapter")
        ids = batches(1)[0]
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            difference = (loaded(input_ids=ids).logits - expected).abs().max().item()
            dense = model.merge_and_unload(dequantise=True)
            merged = (dense(input_ids=ids).logits - expected).abs().max().item()
    kind = type(dense.model.layers[0].self_attn.q_proj).__name__
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    print(f"outputs differ, loaded: {difference:.1e}, merged into {kind}: {merged:.1e}")
    found = {"loaded": difference, "merged": merged}
    return {"losses": losses, "differences": found, "kind": kind, "largest": expected.abs().max().item()}


if __name__ == "__main__":
    main()
