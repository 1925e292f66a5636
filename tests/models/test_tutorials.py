"""What well-known tutorials of Hugging Face PEFT do, with one import changed: the same names, prints and losses."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import peftk

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def small(kind: str, make: type, **sizes: object) -> nn.Module:
    torch.manual_seed(0)
    return make.from_config(AutoConfig.for_model(kind, **sizes))


def trained(
    model: nn.Module, batch: dict[str, torch.Tensor], after: Callable[[int], object] | None = None
) -> list[float]:
    model.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(3):
        output = model(**batch)
        loss = output.loss if getattr(output, "loss", None) is not None else output.last_hidden_state.square().mean()
        loss.backward()
        optimizer.step()
        if after is not None:
            after(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


IDS = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
CLASSES = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}

LORA_ON_BERT = """
from peft import get_peft_config, get_peft_model, LoraConfig, TaskType
config = LoraConfig(task_type=TaskType.SEQ_CLS, inference_mode=False, r=8, lora_alpha=16, lora_dropout=0.1)
model = get_peft_model(base, config)
model.print_trainable_parameters()
print([name for name, p in model.named_parameters() if p.requires_grad])
losses = trained(model, CLASSES)
"""
ADALORA_ON_BERT = """
from peft import AdaLoraConfig, PeftModel, get_peft_model
config = AdaLoraConfig(task_type="SEQ_CLS", init_r=6, target_r=4, tinit=0, tfinal=0, deltaT=1, total_step=9)
model = get_peft_model(base, config)
model.print_trainable_parameters()
print([name for name, p in model.named_parameters() if p.requires_grad])
losses = trained(model, CLASSES, after=lambda step: model.base_model.update_and_allocate(step))
"""
MT0 = """
from peft import LoraConfig, TaskType, get_peft_model
config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
model = get_peft_model(base, config)
model.print_trainable_parameters()
losses = trained(model, IDS)
"""
DINO = """
from peft import LoraConfig, get_peft_model
config = LoraConfig(r=16, lora_alpha=16, target_modules=NAMES, lora_dropout=0.1, bias="none")
model = get_peft_model(base, config)
model.print_trainable_parameters()
losses = trained(model, IMAGES)
"""
ROBERTA_C3A = """
from peft import C3AConfig, TaskType, get_peft_model
config = C3AConfig(block_size=8, task_type=TaskType.SEQ_CLS, target_modules=["query"])
model = get_peft_model(base, config)
model.print_trainable_parameters()
losses = trained(model, CLASSES)
"""
OFT_ON_LLAMA = """
from peft import OFTConfig, get_peft_model
config = OFTConfig(
    oft_block_size=4, use_cayley_neumann=True, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
)
model = get_peft_model(base, config)
model.print_trainable_parameters()
losses = trained(model, IDS)
"""

IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
TUTORIALS = {
    "LoRA on BERT": (LORA_ON_BERT, "bert", AutoModelForSequenceClassification, SMALL | {"vocab_size": 32}),
    "AdaLoRA on BERT": (ADALORA_ON_BERT, "bert", AutoModelForSequenceClassification, SMALL | {"vocab_size": 32}),
    "mt0": (MT0, "mt5", AutoModelForSeq2SeqLM, T5),
    "DINOv2": (DINO, "dinov2", AutoModel, SMALL | {"image_size": 8, "patch_size": 4}),
    "C3A on RoBERTa": (ROBERTA_C3A, "roberta", AutoModelForSequenceClassification, SMALL | {"vocab_size": 32}),
    "OFT on a llama": (OFT_ON_LLAMA, "llama", AutoModelForCausalLM, SMALL | {"vocab_size": 32}),
}


def run(script: str, base: nn.Module, library: types.ModuleType, **names: object) -> tuple[list[float], nn.Module]:
    """Run a script with a library in the place of `peft`."""
    space = {"base": base, "trained": trained, "IDS": IDS, "CLASSES": CLASSES, "IMAGES": IMAGES, **names}
    torch.manual_seed(1)
    exec(script.replace("from peft import", f"from {library.__name__} import"), space)
    return space["losses"], space["model"]


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_one_import_is_all_that_changes(tutorial: str, capsys: pytest.CaptureFixture) -> None:
    script, kind, make, sizes = TUTORIALS[tutorial]
    base = small(kind, make, **sizes)
    # PEFT wants the names that transformers has now.
    theirs, _ = run(script, copy.deepcopy(base), peft, NAMES=["q_proj", "v_proj"])
    expected = capsys.readouterr().out
    ours, model = run(script, copy.deepcopy(base), peftk, NAMES=["query", "value"])
    assert capsys.readouterr().out == expected and "trainable params" in expected
    # C3A's gradients differ: those of PEFT in the input of a layer are wrong.
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    if "C3A" not in tutorial:
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert isinstance(model, peftk.PeftModel) and model.peft_config.keys() == {"default"}
    assert sys.modules["peft"] is peft
