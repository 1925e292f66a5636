"""The strength of adapters, set as diffusers and scripts set it on PEFT's layers: every method, against float64."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from support.layer_cases import CASES, _dense_of, _order, example, make, reference
from torch import nn

from peftk import LoHaConfig, LoKrConfig, LoraConfig, PeftModel
from peftk.methods._base_layer import CONVOLUTIONS
from peftk.testing.compare import assert_close

# DoRA's strength acts inside of its norm, as in PEFT.
LINEAR = [name for name, case in CASES.items() if not getattr(case.config, "use_dora", False)]
PAIRS = [name for name in LINEAR if CASES[name].together in LINEAR]


def at_strengths(layer, x, strengths):
    """The output in float64 where every adapter moves the weight by its strength's share of what it would."""
    base = layer.base_layer
    weight, bias = base.weight.double(), None if layer.bias is None else base.bias.double()
    weight = weight.T if layer.kind == "Conv1D" else weight
    for name in _order(layer, list(strengths)):
        written, added = _dense_of(layer)(layer, name, weight, bias)
        weight = weight + strengths[name] * (written - weight)
        bias = None if bias is None else bias + strengths[name] * (added - bias)
    if isinstance(base, CONVOLUTIONS):
        return base._conv_forward(x.double(), weight, bias)
    if layer.kind == "Embedding":
        return torch.nn.functional.embedding(x, weight)
    return torch.nn.functional.linear(x.double(), weight, bias)


def mergeable(layer):
    try:
        layer.check_merge()
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", LINEAR)
def test_one_adapter(name):
    layer = make(CASES[name]).eval()
    x = example(CASES[name])
    with torch.no_grad():
        full, own = layer(x), layer.base_layer(x)
        expected = {s: at_strengths(layer, x, {"default": s}) for s in (0.0, 0.25, 1.0, -0.5, 1.5)}
        assert_close(full, expected[1.0], torch.float32)
        for strength, value in expected.items():
            layer.set_scale("default", strength)
            assert_close(layer(x), value, torch.float32)
            if mergeable(layer):
                layer.merge()
                assert_close(layer(x), value, torch.float32)
                layer.unmerge()
        layer.set_scale("default", 0)
        assert torch.equal(layer(x), own)
        layer.set_scale("default", 1)
        assert torch.equal(layer(x), full)
        layer.scale_layer(0.5)
        layer.scale_layer(0.5)
        assert_close(layer(x), expected[0.25], torch.float32)
        layer.unscale_layer(0.25)
        assert torch.equal(layer(x), full)
        layer.scale_layer(3.0)
        layer.unscale_layer()
        assert torch.equal(layer(x), full)


@pytest.mark.parametrize("name", PAIRS)
def test_two_adapters(name):
    case = CASES[name]
    layer = make(case)
    layer.add_adapter("other", CASES[case.together].config)
    layer.set_adapter(["default", "other"])
    layer.eval()
    x = example(case)
    with torch.no_grad():
        choices = ((0.5, 1.0), (1.0, 0.5), (0.3, -0.7), (0.0, 0.5), (0.0, 0.0), (1.0, 1.0))
        expected = [at_strengths(layer, x, {"default": first, "other": second}) for first, second in choices]
        for (first, second), value in zip(choices, expected, strict=True):
            layer.set_scale("default", first)
            layer.set_scale("other", second)
            assert_close(layer(x), value, torch.float32)
        assert_close(layer(x), reference(layer, x, ["default", "other"]), torch.float32)
    layer.set_scale("default", 0.5)
    layer.set_adapter("other")
    layer.scale_layer(2.0)
    layer.delete_adapter("default")
    layer.add_adapter("default", case.config)
    layer.set_adapter("default")
    with torch.no_grad():
        # A new adapter of the name begins at 1.
        assert_close(layer(x), reference(layer, x), torch.float32)


@pytest.mark.parametrize("name", [name for name in LINEAR if CASES[name].base == "linear"])
def test_gradients_are_those_of_the_strength(name):
    layer = make(CASES[name]).eval()
    x = example(CASES[name]).requires_grad_()
    # In evaluation mode, as nothing is dropped there.
    layer(x)  # COFT moves its parameters in a pass.
    expected = torch.autograd.grad(at_strengths(layer, x, {"default": 0.25}).sum(), x)[0]
    layer.set_scale("default", 0.25)
    assert_close(torch.autograd.grad(layer(x).sum(), x)[0], expected, torch.float32)


@pytest.mark.parametrize("value", [True, "1", None, torch.tensor(1.0), math.nan, math.inf])
def test_what_is_no_strength(value):
    layer = make(CASES[LINEAR[0]])
    kind = ValueError if isinstance(value, float) else TypeError
    with pytest.raises(kind, match="scale: expected"):
        layer.set_scale("default", value)
    with pytest.raises(kind, match="scale: expected"):
        layer.scale_layer(value)
    if value is not None:
        with pytest.raises(kind, match="scale: expected"):
            layer.unscale_layer(value)
    with pytest.raises(ValueError, match=r"other than 0; unscale_layer\(\) sets"):
        layer.unscale_layer(0.0)
    # A name that this layer does not have is ignored, as in PEFT.
    layer.set_scale("nobody", 0.5)


def test_merged_layers_say_that_their_strength_stands():
    layer = make(CASES[LINEAR[0]]).eval()
    layer.merge()
    for change in (lambda: layer.set_scale("default", 0.5), lambda: layer.scale_layer(2.0)):
        with pytest.warns(UserWarning, match="merged into the weight, whose strength is that of the merge"):
            change()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False),
        LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False, use_rslora=True),
        LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False, use_dora=True),
        LoHaConfig(r=4, alpha=6, target_modules=["0"], init_weights=False),
        LoKrConfig(r=2, alpha=6, target_modules=["0"], init_weights=False),
    ],
    ids=["lora", "rslora", "dora", "loha", "lokr"],
)
def test_the_layers_of_peft_do_the_same(tmp_path, config):
    from peftk import get_peft_model

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 8))

    get_peft_model(base(), config).save_pretrained(tmp_path)
    ours, theirs = PeftModel.from_pretrained(base(), tmp_path), peft.PeftModel.from_pretrained(base(), tmp_path)
    x = torch.randn(3, 12)
    steps = (
        lambda layer: layer.set_scale("default", 0.3),
        lambda layer: layer.scale_layer(2.5),
        lambda layer: layer.unscale_layer(4.0),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.scale_layer(0.0),
        lambda layer: layer.set_scale("default", 1.0),
    )
    for step in steps:
        for model in (ours, theirs):
            step(model.base_model.model[0])
        with torch.no_grad():
            assert_close(ours(x), theirs(x).double(), torch.float32)
    assert ours.base_model.model[0].active_adapter == theirs.base_model.model[0].active_adapter
