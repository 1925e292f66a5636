"""Adapters on stacked experts: `target_parameters`, beside Hugging Face PEFT and in float64."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import peftk
from peftk.testing.compare import assert_close, assert_same_bits

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
COMMON = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
KINDS = {
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, intermediate_size=32, moe_intermediate_size=12, num_experts=5)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, intermediate_size=12, num_local_experts=4)),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**COMMON, intermediate_size=12, num_local_experts=4, pad_token_id=0)
    ),
}
IDS = torch.tensor([[3, 7, 1, 9, 30, 2], [11, 4, 8, 5, 6, 10]])


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = KINDS[request.param]().double()
    # The only one of transformers' own that runs in float64.
    model.config._experts_implementation = "eager"
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def config_of(library, **options):
    options = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": EXPERTS} | options
    return library.LoraConfig(**options)


def filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return model


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(input_ids=IDS, labels=IDS).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}}, {"target_modules": ["q_proj"]}]
)
def test_names_values_and_gradients_are_those_of_peft(base: nn.Module, options: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = filled(peft.get_peft_model(copy.deepcopy(base), config_of(peft, **options)))
    ours = filled(peftk.get_peft_model(base, config_of(peftk, **options)))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    expected, expected_grads = loss_and_gradients(theirs)
    found, found_grads = loss_and_gradients(ours)
    assert_close(found, expected, torch.float64)
    assert found_grads.keys() == expected_grads.keys()
    for name, grad in found_grads.items():
        assert_close(grad, expected_grads[name], torch.float64, what=name)


def test_files_go_both_ways(base: nn.Module, tmp_path) -> None:
    clean, other = copy.deepcopy(base), copy.deepcopy(base)
    ours = filled(peftk.get_peft_model(base, config_of(peftk)))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(clean, tmp_path / "ours")
    expected = ours(input_ids=IDS).logits
    assert_close(theirs(input_ids=IDS).logits, expected, torch.float64)
    theirs.save_pretrained(tmp_path / "theirs")
    again = peftk.PeftModel.from_pretrained(other, tmp_path / "theirs")
    assert_close(again(input_ids=IDS).logits, expected, torch.float64)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert_same_bits(value, two[key], what=key)
