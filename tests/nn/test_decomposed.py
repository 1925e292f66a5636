"""LoHa and LoKr with the magnitudes of DoRA: beside LyCORIS, several of them, dropout, files, quantised layers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.layer_cases import CASES, Case, dense_weight, example, make
from support.quantised import QUANTISE
from torch import Tensor, nn

import peftk
from peftk.nn import LoHaConfig, LoKrConfig, LoraConfig
from peftk.testing.compare import assert_close

CONFIGS = {
    "loha": LoHaConfig(r=2, alpha=3, init_weights=False, use_dora=True),
    "lokr": LoKrConfig(r=2, alpha=3, decompose_factor=2, init_weights=False, use_dora=True),
}
BASES = {"linear": lambda: nn.Linear(12, 10), "conv": lambda: nn.Conv2d(4, 6, 3, padding=1)}


def magnitudes(layer: Any) -> nn.ParameterDict:
    return getattr(layer, layer.magnitudes)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("base", ["linear", "conv"])
@pytest.mark.parametrize("method", CONFIGS)
def test_the_output_is_that_of_lycoris(method: str, base: str, inputs: bool) -> None:
    ours = make(Case(dataclasses.replace(CONFIGS[method], dora_inputs=inputs), base))
    magnitudes(ours)["default"].data.mul_(torch.rand_like(magnitudes(ours)["default"]) + 0.5)
    inner = BASES[base]()
    inner.load_state_dict(ours.base_layer.state_dict())
    factor = {"factor": 2} if method == "lokr" else {}
    modules = pytest.importorskip("lycoris.modules")
    theirs = {"loha": modules.LohaModule, "lokr": modules.LokrModule}[method](
        "layer", inner, 1.0, 2, 3, weight_decompose=True, wd_on_out=not inputs, bypass_mode=False, **factor
    )
    theirs.scale = ours.scaling["default"]
    names = {name for name, _ in theirs.named_parameters()} - {"dora_scale"}
    for name in names:
        getattr(theirs, name).data.copy_(getattr(ours, name)["default"].view_as(getattr(theirs, name)))
    theirs.dora_scale.data.copy_(magnitudes(ours)["default"].view_as(theirs.dora_scale))
    x = example(Case(CONFIGS[method], base))
    assert len(names) >= 2
    assert_close(ours(x), theirs(x).detach().double(), torch.float32)


@pytest.mark.parametrize("base", ["linear", "conv"])
@pytest.mark.parametrize("config", [*CONFIGS.values(), LoraConfig(r=2, use_dora=True)], ids=lambda c: type(c).__name__)
def test_magnitudes_of_inputs_act_and_merge_alone(config: Any, base: str) -> None:
    layer = make(Case(dataclasses.replace(config, dora_inputs=True), base))
    layer.add_adapter("plain", dataclasses.replace(config, use_dora=False))
    x = example(Case(config, base))
    before = layer(x)
    layer.set_adapter(["default", "plain"])
    said = pytest.raises(ValueError, match=r"dora_inputs: .* expected it alone, got 2 adapters on one layer")
    with said:
        layer(x)
    with said:
        layer.merge()
    assert not layer.merged_adapters
    layer.set_adapter("plain")
    layer.merge()
    with said:
        layer.merge(adapter_names=["default"])
    layer.unmerge()
    layer.set_adapter("default")
    assert torch.equal(layer(x), before)
    layer.merge()
    assert_close(layer(x), before.double(), torch.float32)
    # Others are untouched by the rule.
    layer.unmerge()
    layer.set_adapter("plain")
    assert_close(layer(x), (layer.merge() or layer(x)).double(), torch.float32)


def test_magnitudes_of_inputs_are_for_layers_with_channels() -> None:
    with pytest.raises(ValueError, match="dora_inputs: module '' is an embedding, whose inputs are indices"):
        peftk.nn.LoRAEmbedding(nn.Embedding(4, 3), LoraConfig(r=2, use_dora=True, dora_inputs=True))


@pytest.mark.parametrize("base", ["linear", "conv"])
@pytest.mark.parametrize("method", CONFIGS)
def test_several_act_in_turn_and_merge_as_they_act(method: str, base: str) -> None:
    config = CONFIGS[method]
    layer = make(Case(config, base))
    plain = type(config)(**config.to_dict() | {"use_dora": False})
    layer.add_adapter("plain", plain)
    layer.add_adapter("b", config)
    for name in ("default", "b"):
        magnitudes(layer)[name].data.mul_(torch.rand_like(magnitudes(layer)[name]) + 0.5)
    x = example(Case(config, base))
    original = layer.base_layer.weight.detach().double()
    run = nn.functional.linear if base == "linear" else layer.base_layer._conv_forward
    for names in (["default", "b"], ["b", "plain", "default"], ["plain", "b"], ["b", "plain"]):
        layer.set_adapter(names)
        weight = original
        for name in names:
            update = layer.get_delta_weight(name).double()
            weight = weight + update
            if name in magnitudes(layer):
                gain = magnitudes(layer)[name].detach().double() / (original + update).flatten(1).norm(dim=1)
                weight = weight * gain.view(-1, *[1] * (weight.dim() - 1))
        expected = run(x.double(), weight, layer.base_layer.bias.detach().double())
        assert_close(layer(x), expected, torch.float32)
        layer.merge()
        assert_close(layer(x), expected, torch.float32)
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight.detach().double(), original)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_dropped_layer_is_the_base_layer(method: str) -> None:
    config = type(CONFIGS[method])(**CONFIGS[method].to_dict() | {"module_dropout": 0.999999})
    layer = make(config).train()
    magnitudes(layer)["default"].data.mul_(2)
    x = torch.randn(3, 12)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.equal(layer.eval()(x), layer.base_layer(x))


@pytest.mark.parametrize("method", CONFIGS)
def test_norms_are_those_of_the_whole_update(method: str) -> None:
    config = type(CONFIGS[method])(**CONFIGS[method].to_dict() | {"rank_dropout": 0.5})
    layer = make(config).train()
    x = torch.randn(3, 12)
    weight, bias = dense_weight(layer)
    base = layer.base_layer.weight.detach().double()
    gain = magnitudes(layer)["default"].detach().double() / (base + layer.get_delta_weight("default")).norm(dim=1)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    kept = (torch.rand(1), torch.rand(10) > 0.5)[1].double()
    share = kept.mean() if method == "loha" else 1.0
    rows = gain[:, None] * (base + kept[:, None] / share * (weight.detach() / gain[:, None] - base))
    assert_close(y, nn.functional.linear(x.double(), rows, bias.detach()), torch.float32)


@pytest.mark.parametrize("method", CONFIGS)
def test_files(method: str, tmp_path: Path) -> None:
    config = type(CONFIGS[method])(**CONFIGS[method].to_dict() | {"target_modules": ["0"]})
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10)).state_dict()

    def fresh() -> nn.Module:
        model = nn.Sequential(nn.Linear(12, 10))
        model.load_state_dict(base)
        return model

    model = peftk.get_peft_model(fresh(), config)
    layer = model.get_submodule("base_model.model.0")
    magnitudes(layer)["default"].data.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    loaded = peftk.PeftModel.from_pretrained(fresh(), tmp_path)
    x = torch.randn(3, 12)
    assert torch.equal(loaded(x), model.eval()(x))
    # A file of a plain adapter is not loaded over one with magnitudes.
    plain = type(config)(**config.to_dict() | {"use_dora": False})
    other = peftk.get_peft_model(fresh(), plain)
    with pytest.raises(ValueError, match="use_dora"):
        other.load_adapter(tmp_path, "default")
    # PEFT, which has no such field, meets it in no other file.
    other.save_pretrained(tmp_path / "plain")
    assert "use_dora" not in json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path / "plain")
    assert_close(theirs(x), other.eval()(x).detach().double(), torch.float32)


@pytest.mark.parametrize("kind", [kind for kind in QUANTISE if kind.startswith(("bnb", "torchao"))])
@pytest.mark.parametrize("method", CONFIGS)
def test_quantised_layers(method: str, kind: str) -> None:
    config = type(CONFIGS[method])(**CONFIGS[method].to_dict() | {"init_weights": True, "target_modules": ["0"]})
    torch.manual_seed(0)
    base = nn.Sequential(QUANTISE[kind](nn.Linear(64, 64)))
    x = torch.randn(4, 64)
    with torch.no_grad():
        before: Tensor = base(x)
        model = peftk.get_peft_model(base, config)
        assert torch.equal(model(x), before)
        layer = model.get_submodule("base_model.model.0")
        magnitudes(layer)["default"].mul_(2)
        bias = layer.bias
        expected = 2 * (before - bias) + bias
        assert_close(model(x), expected.double(), before.dtype)


def test_the_cases_have_gains() -> None:
    assert {name for name, case in CASES.items() if case.decomposes} >= {"loha_dora", "lokr_dora", "lokr_dora_conv"}
