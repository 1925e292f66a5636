"""Accelerated X-LoRA and Llama-Adapter of Hugging Face PEFT, whose layers are not like the others."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.peft_layers import error
from support.xlora_models import llama, pair

import peftk

IDS = torch.arange(1, 17).view(2, 8)


@pytest.mark.parametrize(
    "values", [{}, {"top_k_lora": 2}, {"top_k_lora": 2, "enable_softmax_topk": True}, {"layerwise_scalings": True}]
)
def test_xlora(experts: dict[str, str], values: dict[str, object]) -> None:
    _, theirs = pair(llama(), experts, **values)
    expected = theirs(input_ids=IDS, labels=IDS)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in theirs.named_parameters() if p.grad is not None}
    theirs.zero_grad()
    report = peftk.accelerate(theirs)
    assert report.accelerated == len(report) > 0 and {row.kind for row in report} == {"xlora.XLoraLinearLayer"}
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
def test_llama_adapter(training: bool) -> None:
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config).train(training)
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
