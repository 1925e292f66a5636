"""Merging into layers with quantised weights: refused, or for good into dense layers."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layer_cases import CASES, I
from support.quantised import (
    LIBRARIES,
    QUANTISE,
    WEIGHT,
    adapter_parameters,
    dequantised,
    linear,
    net,
)
from torch import nn
from transformers import LlamaConfig

from peftk import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peftk.nn import AdapterLayer, layer_class_for
from peftk.testing.compare import assert_close, assert_same_bits


@pytest.mark.parametrize("kind", QUANTISE)
def test_merging_is_refused_and_changes_nothing(kind):
    config = copy.deepcopy(CASES["c3a"].config)
    config.target_modules = ["first", "second"]
    base = net(kind)
    parts = [base.first, base.second]
    model = get_peft_model(base, config)
    model.add_adapter("dense", LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
    x = torch.randn(3, I, requires_grad=True)
    before, tensors = model(x), adapter_parameters(model)
    message = rf"'first'.*{type(parts[0]).__name__} is {WEIGHT[kind]},.*unload\(\).*full precision"
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match=message):
            merge()
    for merge in (model.first.merge, model.first.merged_tensors):
        with pytest.raises(ValueError, match=rf"{WEIGHT[kind]},.*unload\(\)"):
            merge()
    assert_same_bits(model(x), before)
    assert adapter_parameters(model).keys() == tensors.keys()
    # Layers that are not quantised are merged as ever.
    model.merge_adapter(["dense"])
    assert model.head.merged_adapters == ["dense"] and not model.first.merged_adapters
    model.unmerge_adapter()
    unloaded = model.unload()
    assert [unloaded.first, unloaded.second] == parts
    assert not isinstance(unloaded.head, AdapterLayer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.parametrize("name", ["lora", "dora", "oft", "lokr"])
def test_merging_for_good_into_dense_layers(name, kind, dtype):
    config = copy.deepcopy(CASES[name].config)
    config.target_modules = ["first"]
    model = get_peft_model(net(kind).to(dtype) if "torchao" in kind or dtype is torch.float32 else net(kind), config)
    if dtype is not torch.float32 and "bnb" in kind:
        model.get_base_model().head.to(dtype)
    base = model.get_base_model().first
    dense = layer_class_for(config, linear(sizes=(base.in_features, base.out_features)))
    other = linear(sizes=(base.in_features, base.out_features)).double()
    with torch.no_grad():
        other.weight.copy_(dequantised(base.base_layer))
        other.bias.copy_(base.bias)
    exact = dense(other, config, autocast_adapter_dtype=False)
    exact.load_state_dict({n: p.double() for n, p in base.state_dict().items() if "base_layer" not in n}, strict=False)
    x = torch.randn(3, I)
    if name == "lora":
        with torch.no_grad():
            base.lora_A["default"].weight[0, 0], kept = torch.nan, base.lora_A["default"].weight[0, 0].clone()
        with pytest.raises(ValueError, match="safe_merge"):
            model.merge_and_unload(safe_merge=True, dequantise=True)
        assert type(base.base_layer.weight).__name__ == WEIGHT[kind], "what fails changes nothing"
        with torch.no_grad():
            base.lora_A["default"].weight[0, 0] = kept
    merged = model.merge_and_unload(dequantise=True).first
    assert type(merged) is nn.Linear
    assert_close(merged(x.to(merged.weight.dtype)), exact(x.double()), merged.weight.dtype)
    assert_close(merged.weight, exact.merged_tensors()["weight"], merged.weight.dtype)


def test_the_configuration_of_a_model_that_is_dense_now_is_told():
    model = net("bnb_nf4")
    model.config = LlamaConfig(quantization_config={"load_in_4bit": True})
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["first"]))
    with pytest.warns(UserWarning, match="dequantise: 1 layers are dense now, .* quantization_config"):
        adapted.merge_and_unload(dequantise=True)


def test_what_nobody_can_read_is_not_made_dense():
    model = get_peft_model(net("locked"), LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match=r"unload\(\)"):
        model.merge_and_unload(dequantise=True)


@pytest.mark.parametrize("kind", [kind for kind in LIBRARIES if kind.startswith("bnb")])
@pytest.mark.parametrize("name", ["lora", "oft", "lokr_dora"])
def test_merging_for_good_into_layers_that_are_quantised_again(name, kind):
    config = copy.deepcopy(CASES[name].config)
    config.target_modules = ["first"]
    base = net(kind)
    old, x = base.first, torch.randn(3, I)
    model, twin = (get_peft_model(copy.deepcopy(base), config) for _ in range(2))
    set_peft_model_state_dict(twin, get_peft_model_state_dict(model))
    dense = twin.merge_and_unload(dequantise=True)
    with pytest.warns(UserWarning, match=r"requantise: .* share of \d\.\d\d .* in 'first'"):
        merged = model.merge_and_unload(requantise=True)
    assert type(merged.first) is type(old) and type(merged.first.weight) is type(old.weight)
    expected = QUANTISE[kind](dense.first)
    assert torch.equal(dequantised(merged.first), dequantised(expected))
    assert not torch.equal(dequantised(merged.first), dequantised(old))
    assert_same_bits(merged.first(x), expected(x))
    # What is made can be saved, and adapted anew.
    assert merged.state_dict().keys() == base.state_dict().keys()
    get_peft_model(merged, LoraConfig(r=2, target_modules=["first"])).merge_and_unload(dequantise=True)


@pytest.mark.parametrize("kind", [kind for kind in LIBRARIES if kind.startswith("torchao")])
def test_what_does_not_say_how_it_was_quantised_is_not_quantised_again(kind):
    base = net(kind)
    first = base.first
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["first", "head"], init_lora_weights=False))
    head = model.get_base_model().head.base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"requantise: .*bitsandbytes.*'first'.*dequantise=True"):
        model.merge_and_unload(requantise=True)
    assert model.first.base_layer is first and torch.equal(model.head.base_layer.weight, head)
