"""`update_layer`: an adapter that is made anew is the one that a new layer would have, and no file lies about it."""

from __future__ import annotations

import copy
import dataclasses

import peft
import pytest
import torch
from support.layer_cases import CASES, TOYS, example, make
from support.toy_model import X, assert_unchanged, lora, snapshot, toy
from torch import nn

import peftk
from peftk import LoraConfig, PeftModel, get_peft_model


def arguments(layer, config):
    return [getattr(config, field) for field in layer.update_fields.values()]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_an_updated_adapter_is_a_new_one(name):
    case = CASES[name]
    layer, fresh = make(case), make(case)
    x = example(case)
    other = dataclasses.replace(case.config)
    torch.manual_seed(5)
    layer.update_layer("default", *arguments(layer, other), config=other)
    torch.manual_seed(5)
    fresh.delete_adapter("default")
    fresh.add_adapter("default", other)
    fresh.set_adapter("default")
    assert torch.equal(layer.eval()(x), fresh.eval()(x))
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == {
        n: p.requires_grad for n, p in fresh.named_parameters()
    }
    # Another one stands beside those that act.
    before = layer(x)
    layer.update_layer("more", *arguments(layer, other), other, target_name="somewhere")
    assert layer.adapter_names == ["default", "more"]
    assert layer.active_adapters == ["default"]
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    "method", [m for m in TOYS if hasattr(peft, type(TOYS[m].config).__name__) and m != "dora_inputs"]
)
def test_the_arguments_are_those_of_peft(method):
    config = TOYS[method].config
    if method == "boft":
        config = dataclasses.replace(config, boft_n_butterfly_factor=1)
    ours = get_peft_model(toy(), config).base_model.model.layers[0].query
    own = {k: v for k, v in config.to_dict().items() if k not in ("auto_mapping", "runtime_config", "orth_reg_in_loss")}
    theirs = peft.get_peft_model(toy(), peft.PeftConfig.from_peft_type(**own))
    layer = theirs.base_model.model.layers[0].query
    values = {name: getattr(config, field) for name, field in ours.update_fields.items()}
    for one, given in ((ours, config), (layer, theirs.peft_config["default"])):
        one.update_layer("other", **values, config=given)
    found, expected = (
        {name: p.shape for name, p in one.named_parameters() if ".other" in name} for one in (ours, layer)
    )
    assert found == expected and found


def test_ranks_and_scales_are_those_that_are_given():
    layer = peftk.nn.LoRALinear(nn.Linear(8, 6), LoraConfig(r=2))
    config = LoraConfig(r=2, rank_pattern={".*": 3}, alpha_pattern={".*": 7})
    layer.update_layer("default", 4, 6, config)
    assert (layer.r["default"], layer.scaling["default"]) == (4, 1.5)
    assert layer.lora_A["default"].weight.shape == (4, 8)
    assert layer.active_adapters == ["default"]
    assert layer.lora_A["default"].weight.requires_grad
    # What was given stays as it was.
    assert config.r == 2 and config.rank_pattern == {".*": 3}


@pytest.mark.parametrize(
    ("given", "options", "error", "match"),
    [
        ((4,), {}, TypeError, "lora_alpha: update_layer expects r, lora_alpha, config"),
        ((4, 8), {}, TypeError, "config: update_layer expects r, lora_alpha, config"),
        ((4, 8), {"config": 1}, TypeError, "config: expected the configuration of an adapter, got int"),
        ((4, 8, LoraConfig(), 1), {}, TypeError, "expected 3 arguments after adapter_name at most, got 4"),
        ((4, 8, LoraConfig()), {"rank": 1}, TypeError, "rank: update_layer expects"),
        ((0, 8, LoraConfig()), {}, ValueError, "r: expected"),
        ((4, 8, peftk.OFTConfig(oft_block_size=2)), {}, TypeError, "lora_alpha|OFTConfig"),
    ],
)
def test_bad_arguments_change_nothing(given, options, error, match):
    model = get_peft_model(toy(), lora())
    before = snapshot(model)
    with pytest.raises(error, match=match):
        model.base_model.model.layers[0].query.update_layer("default", *given, **options)
    assert_unchanged(model, before)


def test_layers_that_take_no_configuration_alone_say_what_they_take():
    assert peftk.nn.BOFTLinear.update_fields == {}
    layer = peftk.nn.BOFTLinear(nn.Linear(8, 8), peftk.BOFTConfig(boft_block_size=4))
    layer.update_layer("default", peftk.BOFTConfig(boft_block_size=2))
    assert layer.boft_R["default"].shape[-1] == 2
    with pytest.raises(TypeError, match="expected 1 arguments after adapter_name at most, got 2"):
        layer.update_layer("default", 2, peftk.BOFTConfig(boft_block_size=2))


def test_merged_adapters_are_refused():
    model = get_peft_model(toy(), lora())
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged; unmerge it before updating it"):
        model.base_model.model.layers[0].query.update_layer("default", 2, 8, lora())


def test_an_interruption_leaves_the_layer_as_it_was(monkeypatch):
    model = get_peft_model(toy(), lora())
    before, expected = snapshot(model), model(X)
    layer = model.base_model.model.layers[0].query
    plain = type(layer).attach

    def interrupted(self, name, adapter):
        plain(self, name, adapter)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(layer), "attach", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer.update_layer("default", 4, 8, lora())
    monkeypatch.undo()
    assert_unchanged(model, before)
    assert torch.equal(model(X), expected)


def test_no_file_says_something_else_than_the_layers(tmp_path):
    model = get_peft_model(toy(), lora(r=2)).eval()
    for _, layer in model.base_model._layers():
        layer.update_layer("default", 4, 6, lora())
    with pytest.raises(ValueError, match=r"update_layer of module 'layers.0.query' has changed 'default'.* r: "):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"r: adapter 'default' has rank 4 on module 'layers.0.query' and .* says 2"):
        peftk.get_peft_model_state_dict(model)
    config = model.peft_config["default"]
    config.r, config.lora_alpha = 4, 6
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(toy(), tmp_path)(X), model(X))
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
