"""Every adapted layer: merging, several adapters, switching off, deletion, copies of merged layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.layer_cases import CASES, dense_weight, example, make, reference

from peftk.testing.compare import assert_close


def made(name, **kwargs):
    return make(CASES[name], bias=CASES[name].base != "embedding", **kwargs)


@pytest.mark.parametrize("name", CASES)
def test_merged_output_equals_the_unmerged_and_unmerging_is_exact(name):
    layer = made(name)
    x = example(CASES[name])
    layer(x)  # COFT projects its parameters when it is first used
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    expected = reference(layer, x)
    layer.merge(safe_merge=True)
    assert layer.merged
    assert_close(layer(x), expected, torch.float32)
    assert_close(layer.base_layer(x), expected, torch.float32)
    assert list(layer.state_dict()) == list(before)
    layer.unmerge()
    assert not layer.merged
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_a_merged_weight_is_the_float64_one_rounded_once(name, dtype):
    layer = made(name, dtype=dtype)
    layer(example(CASES[name], dtype=dtype))  # COFT projects its parameters when it is first used
    exact = dense_weight(layer)[0]
    original = layer.base_layer.weight.clone()
    for keep_base in ("device", "cpu"):
        layer.merge(keep_base=keep_base)
        ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
        assert ((layer.base_layer.weight.double() - exact).abs() <= ulp).all()
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight, original)
    with pytest.raises(ValueError, match="keep_base"):
        layer.merge(keep_base="disk")


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.together])
def test_several_adapters_act_together_and_merge_in_order(name):
    layer = made(name)
    torch.manual_seed(1)
    layer.add_adapter("b", CASES[CASES[name].together].config)
    x = example(CASES[name])
    assert_close(layer(x), reference(layer, x), torch.float32)
    for names in (["default", "b"], ["b", "default"], ["b"]):
        layer.set_adapter(names)
        expected = reference(layer, x, names)
        assert_close(layer(x), expected, torch.float32)
        layer.merge()
        assert_close(layer(x), expected, torch.float32)
        layer.unmerge()
    # Merging one after another is merging both.
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["default", "b"]
    assert_close(layer(x), reference_of(layer, x, ["default", "b"]), torch.float32)
    with pytest.warns(UserWarning, match="unmerged"):
        layer.set_adapter("b")
    assert not layer.merged


@pytest.mark.parametrize("name", ["lora", "oft"])
def test_merging_again_starts_from_the_weight_of_now(name):
    layer = made(name)
    layer.merge()
    layer.unmerge()
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    x = example(CASES[name])
    expected = reference(layer, x)
    layer.merge()
    assert_close(layer(x), expected, torch.float32)


def reference_of(layer, x, names):
    twin = copy.deepcopy(layer)
    twin.unmerge()
    return reference(twin, x, names)


@pytest.mark.parametrize("name", CASES)
def test_activation_disabling_and_deletion(name):
    layer = made(name)
    layer.add_adapter("b", CASES[name].config)
    assert not any(p.requires_grad and "b" in n.split(".") for n, p in layer.named_parameters())
    x = example(CASES[name])
    base = layer.base_layer(x)
    on = layer(x)
    assert not torch.equal(on, base)
    flags = [p.requires_grad for p in layer.parameters()]
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    assert torch.equal(layer(x), on)
    assert [p.requires_grad for p in layer.parameters()] == flags
    layer.set_adapter("b")
    trained = [n.split(".") for n, p in layer.named_parameters() if p.requires_grad]
    assert trained and all("b" in parts for parts in trained)
    layer.set_adapter("b", inference_mode=True)
    assert not any(p.requires_grad for p in layer.parameters())
    layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer.delete_adapter("b")
    layer.unmerge()
    layer.delete_adapter("b")
    assert layer.adapter_names == ["default"]
    assert not any("b" in n.split(".") for n in layer.state_dict())
    assert torch.equal(layer(x), base)
    layer.set_adapter("default")
    assert torch.equal(layer(x), on)


@pytest.mark.parametrize("name", CASES)
def test_disabling_a_merged_layer_gives_the_base_output(name):
    layer = made(name)
    x = example(CASES[name])
    base = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("name", CASES)
def test_safe_merge_refuses_before_it_changes_anything(name):
    layer = made(name)
    with torch.no_grad():
        next(p for p in layer.parameters() if p.requires_grad).fill_(float("nan"))
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="safe_merge"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_a_bias_that_cannot_be_merged_is_refused():
    with pytest.warns(UserWarning, match="lora_bias"):
        layer = make(CASES["lora_bias"], bias=False)
    with pytest.raises(ValueError, match="lora_bias"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("name", CASES)
def test_copies_pickles_and_moves(name):
    layer = made(name)
    x = example(CASES[name])
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
        twin.merge()
        twin.unmerge()
    merged = copy.deepcopy(layer)
    merged.merge()
    original = layer.base_layer.weight
    for twin in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        twin.unmerge()
        assert torch.equal(twin.base_layer.weight, original)
    merged.double()
    merged.unmerge()
    assert torch.equal(merged.base_layer.weight, original.double())
    assert_close(merged(x.double() if x.is_floating_point() else x), reference(layer, x), torch.float32)
