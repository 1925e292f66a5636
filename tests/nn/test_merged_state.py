"""What is loaded into, added to, saved from and done to a merged layer or model is neither lost nor undone silently."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.layer_cases import CASES, example, make
from support.toy_model import METHODS, X, assert_unchanged, lora, snapshot, toy
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peftk.models.peft_model import PeftModel, get_peft_model
from peftk.nn import LoraConfig


def scaled(state, factor=2):
    return {key: value * factor for key, value in state.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_merged_layer_refuses_what_unmerging_would_undo(name):
    layer = make(CASES[name], bias=CASES[name].base != "embedding")
    layer.add_adapter("other", CASES[name].config)
    x = example(CASES[name])
    original = copy.deepcopy(layer.state_dict())
    layer.merge()
    merged, y = copy.deepcopy(layer.state_dict()), layer(x)
    trained = [key for key in original if "default" in key.split(".")]
    for keys in (["base_layer.weight"], trained, trained[-1:], original):
        for assign in (False, True):
            with pytest.raises(ValueError, match=r"cannot be loaded while \['default'\] are merged into this layer"):
                layer.load_state_dict({key: original[key] * 2 for key in keys}, strict=False, assign=assign)
            assert all(torch.equal(value, merged[key]) for key, value in layer.state_dict().items())
    # Nothing of this is touched by merging.
    others = {key: value * 2 for key, value in original.items() if "other" in key.split(".")}
    layer.load_state_dict(others, strict=False)
    assert torch.equal(layer(x), y)
    layer.unmerge()
    layer.load_state_dict(scaled(original))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, original[key] * 2)


@pytest.mark.filterwarnings("ignore:set_adapter")
@pytest.mark.parametrize("name", CASES)
def test_what_is_written_to_a_merged_weight_is_not_undone(name):
    layer = make(CASES[name], bias=CASES[name].base != "embedding")
    layer.add_adapter("other", CASES[name].config)
    layer.merge()
    written = scaled(layer.base_layer.state_dict())
    layer.base_layer.load_state_dict(written)
    written_to = r"was written to while \['default'\] were merged into it"
    alone = "dora_inputs: .* expected it alone" if getattr(CASES[name].config, "dora_inputs", False) else written_to
    for call, message in (
        (layer.unmerge, written_to),
        (lambda: layer.merge(adapter_names=["other"]), alone),
        (lambda: layer.enable_adapters(False), written_to),
        (lambda: layer.set_adapter("other"), written_to),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert layer.merged_adapters == layer.active_adapters == ["default"] and not layer.disable_adapters
        assert all(torch.equal(value, written[key]) for key, value in layer.base_layer.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_training_a_merged_model_is_not_undone(name):
    model = get_peft_model(toy(), METHODS[name])
    model.merge_adapter()
    weight = model.get_base_model().layers[1].query.base_layer.weight.requires_grad_()
    model(X).sum().backward()
    # A gradient alone is no reason to stay merged.
    copy.deepcopy(model).unmerge_adapter()
    model.unmerge_adapter()
    model.merge_adapter()
    torch.optim.SGD([weight], lr=0.1).step()
    before, y = snapshot(model), model(X)

    def disable():
        with model.disable_adapter():
            pass

    for call in (model.unmerge_adapter, disable, model.unload, lambda: model.set_adapter("default")):
        with pytest.raises(ValueError, match=r"module 'layers\.1\.query'.*written to.*merge_and_unload\(\) keeps it"):
            call()
        assert_unchanged(model, before)
    assert torch.equal(model.merge_and_unload()(X), y)


@pytest.mark.parametrize("name", METHODS)
def test_a_merged_model_refuses_a_load_before_it_changes_anything(name):
    model = get_peft_model(toy(), METHODS[name])
    holder = nn.ModuleDict({"inner": model})
    model.merge_adapter()
    states = {model: model.state_dict(), holder: holder.state_dict(), model.base_model: model.base_model.state_dict()}
    before = snapshot(model)
    for module, state in states.items():
        with pytest.raises(ValueError, match=r"base_layer.*merged into '.*layers\.0\.query'.*unmerge first"):
            module.load_state_dict(scaled(state))
        assert_unchanged(model, before)
    # From the base model itself the layer is found on the way; what stands before it may be loaded by then.
    with pytest.raises(ValueError, match=r"merged into 'layers\.0\.query'"):
        model.get_base_model().load_state_dict(scaled(model.get_base_model().state_dict()))
    assert_unchanged(model, before)
    head = {f"base_model.model.classifier.{key}": torch.ones_like(p) for key, p in toy().classifier.named_parameters()}
    model.load_state_dict(head, strict=False)
    assert model.get_base_model().classifier.weight.eq(1).all()
    model.unmerge_adapter()
    state = scaled(model.state_dict())
    model.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_copies_pickles_and_casts_of_merged_models(name):
    base = toy()
    model = get_peft_model(base, METHODS[name])
    y, original = model(X), {key: value.clone() for key, value in model.state_dict().items()}
    halved = copy.deepcopy(model).half().state_dict()
    model.merge_adapter()
    merged = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), merged)
        twin.unmerge_adapter()
        assert all(torch.equal(value, original[key]) for key, value in twin.state_dict().items())
        assert torch.equal(twin(X), y)
    assert torch.equal(model(X), merged)
    for dtype in (torch.float64, torch.bfloat16):
        twin = copy.deepcopy(model).to(dtype)
        twin.unmerge_adapter()
        assert all(torch.equal(value, original[key].to(dtype)) for key, value in twin.state_dict().items())
    model.half()
    model.unmerge_adapter()
    assert all(torch.equal(value, halved[key]) for key, value in model.state_dict().items())


def test_files_and_merged_models(tmp_path):
    model = get_peft_model(toy(), lora())
    model.save_pretrained(tmp_path)
    y = model(X)
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match="merged"):
        model.load_adapter(tmp_path, "default")
    assert_unchanged(model, before)
    model.load_adapter(tmp_path, "again")
    model.merge_adapter(["again"])
    model.unmerge_adapter()
    model.set_adapter("again")
    assert torch.equal(model(X), y)


def test_a_file_with_embeddings_is_not_loaded_into_merged_ones(tmp_path):
    torch.manual_seed(0)
    sizes = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=8, tie_word_embeddings=False)
    base = GPT2LMHeadModel(sizes)
    import peft
    from safetensors.torch import load_file, save_file

    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in tensors
    save_file(tensors | {key: tensors[key] + 1}, path)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model_id.*lm_head\.base_layer\.weight.*merged into it at 'lm_head'"):
        model.load_adapter(tmp_path, "theirs")
    assert_unchanged(model, before)
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "theirs")
    assert torch.equal(model.get_base_model().lm_head.base_layer.weight, tensors[key] + 1)


def test_biases_are_saved_without_what_is_merged_into_them(tmp_path):
    model = get_peft_model(toy(), lora(lora_bias=True, bias="lora_only"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                p.add_(1)
    y = model(X)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(toy(), tmp_path)(X), y)
    twin = get_peft_model(toy(), lora(lora_bias=True))
    twin.merge_adapter()
    before = snapshot(twin)
    with pytest.raises(ValueError, match=r"base_layer\.bias.*merged into it at 'layers\.0\.query'"):
        twin.load_adapter(tmp_path, "more")
    assert_unchanged(twin, before)


def test_a_dora_adapter_is_not_added_to_a_merged_layer():
    model = get_peft_model(toy(), lora())
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"use_dora.*merged into it; unmerge first"):
        model.add_adapter("second", lora(use_dora=True))
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="use_dora"):
        model.get_base_model().layers[0].query.add_adapter("second", lora(use_dora=True))
    model.unmerge_adapter()
    model.add_adapter("second", lora(use_dora=True, init_lora_weights=True))
    model.set_adapter("second")
    assert torch.equal(model(X), toy()(X))
