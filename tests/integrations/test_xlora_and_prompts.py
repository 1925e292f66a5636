"""Accelerated X-LoRA and Llama-Adapter of Hugging Face PEFT, whose layers are not like the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from support.parity_cases import GPT2_SIZES
from support.peft_layers import error
from support.xlora_models import llama, pair, save_experts
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import peftk

IDS = torch.arange(1, 17).view(2, 8)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)).eval()


@pytest.mark.parametrize(
    "values", [{}, {"top_k_lora": 2}, {"top_k_lora": 2, "enable_softmax_topk": True}, {"layerwise_scalings": True}]
)
@pytest.mark.parametrize("embeddings", [False, True])
def test_xlora(experts: dict[str, str], tmp_path: Path, embeddings: bool, values: dict[str, object]) -> None:
    kinds = {"xlora.XLoraLinearLayer"}
    if embeddings:
        kinds.add("xlora.XLoraEmbeddingLayer")
        targets = ["q_proj"], ["embed_tokens"], ["embed_tokens", "q_proj"]
        settings = [{"r": 2 + number, "target_modules": names} for number, names in enumerate(targets)]
        experts = save_experts(llama(), settings, tmp_path)
    _, theirs = pair(llama(), experts, **values)
    expected = theirs(input_ids=IDS, labels=IDS)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in theirs.named_parameters() if p.grad is not None}
    theirs.zero_grad()
    report = peftk.accelerate(theirs)
    assert report.accelerated == len(report) > 0 and {row.kind for row in report} == kinds
    got = theirs(input_ids=IDS, labels=IDS)
    assert error(got.logits, expected.logits) < 1e-5
    got.loss.backward()
    assert gradients
    for name, gradient in gradients.items():
        assert error(theirs.get_parameter(name).grad, gradient) < 1e-4, name
    with torch.no_grad():
        # PEFT keeps the last weights of the experts, and a copy takes none that a graph made.
        theirs(input_ids=IDS)
    copied = copy.deepcopy(theirs)
    with theirs.disable_adapter():
        base = theirs(input_ids=IDS).logits
    assert report.restore() == len(report)
    with theirs.disable_adapter():
        # Before PEFT 0.21 the layers run on while the adapter is disabled.
        assert error(theirs(input_ids=IDS).logits, base) < 1e-5
    assert torch.equal(theirs(input_ids=IDS, labels=IDS).logits, expected.logits)
    assert error(copied(input_ids=IDS).logits, expected.logits) < 1e-5


def test_xlora_that_is_made_in_an_accelerated_process(experts: dict[str, str]) -> None:
    report = peftk.accelerate("peft")
    try:
        _, theirs = pair(llama(), experts)
        fast = theirs(input_ids=IDS).logits
        assert peftk.accelerate(theirs).restore() > 0
    finally:
        report.restore()
    # Its layers keep the method that they were made with.
    plain = theirs(input_ids=IDS).logits
    _, never = pair(llama(), experts)
    assert torch.equal(plain, never(input_ids=IDS).logits)
    assert error(fast, plain) < 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_adaption_prompts(make: Callable[[], nn.Module], training: bool) -> None:
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make(), config).train(training)
    for name, parameter in model.named_parameters():
        if "adaption_gate" in name:
            parameter.data.fill_(0.7)
    expected = model(input_ids=IDS, labels=IDS)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    report = peftk.accelerate(model)
    assert report.accelerated == len(report) == 1
    got = model(input_ids=IDS, labels=IDS)
    got.loss.backward()
    assert error(got.logits, expected.logits) < 1e-5
    assert gradients
    for name, gradient in gradients.items():
        assert error(model.get_parameter(name).grad, gradient) < 1e-4, name
    assert report.restore() == 1
    assert torch.equal(model(input_ids=IDS).logits, expected.logits)


@pytest.mark.parametrize("change", ["hook", "lora"])
def test_a_gpt2_projection_that_is_not_plain_is_called(change: str) -> None:
    model = peft.get_peft_model(gpt2(), peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1)).eval()
    attention = next(m for m in model.modules() if type(m).__name__ == "AdaptedAttentionGPT")
    attention.adaption_gate.data.fill_(0.7)
    projection = attention.model.c_attn
    if change == "hook":
        projection.register_forward_hook(lambda module, args, output: output + 1)
    else:
        attention.model = peft.inject_adapter_in_model(
            peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True),
            attention.model,
        )
    expected = model(input_ids=IDS).logits
    report = peftk.accelerate(model)
    assert [row.accelerated for row in report if row.kind.startswith("adaption_prompt")] == [True]
    assert error(model(input_ids=IDS).logits, expected) < 1e-5
