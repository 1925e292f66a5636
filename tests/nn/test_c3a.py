"""C3A beyond what the generic tests cover: where Hugging Face PEFT is wrong, and what is refused."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from support.layer_cases import I, make, reference
from support.parity_cases import MLP
from torch import nn

from peftk import PeftModel, get_peft_model
from peftk.nn import C3AConfig, C3AConv2d, C3ALinear
from peftk.testing.cases import circulant
from peftk.testing.compare import assert_close, error


def both(size, features=(12, 12)):
    """The same layer and kernel in peftk and in PEFT, both in float32."""
    torch.manual_seed(0)
    base = nn.Linear(*features)
    ours = C3ALinear(copy.deepcopy(base), C3AConfig(block_size=size, init_weights="gaussian"))
    model = nn.Sequential(copy.deepcopy(base))
    config = peft.C3AConfig(block_size=size, init_weights="gaussian", target_modules=["0"])
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    with torch.no_grad():
        theirs.c3a_kernel["default"].copy_(ours.c3a_kernel["default"])
    return ours, theirs


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_the_gradient_in_the_input_is_right_and_that_of_peft_is_not(size):
    ours, theirs = both(size)
    # The base product would hide the error: what remains is the adapter's own gradient.
    for layer in (ours, theirs):
        layer.base_layer.weight.data.zero_()
    x, grad = torch.randn(5, 12), torch.randn(5, 12)
    found = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(grad)
        found.append((y.detach(), leaf.grad, layer.c3a_kernel["default"].grad))
    dense = circulant.dense(ours.c3a_kernel["default"].detach().double()) / 12
    truth = grad.double() @ dense
    assert_close(found[0][0], x.double() @ dense.T + ours.bias.double(), torch.float32)
    assert_close(found[0][1], truth, torch.float32)
    # The outputs agree, and so do the gradients of the kernel.
    for mine, other in zip(found[0][::2], found[1][::2], strict=True):
        assert_close(mine, other.double(), torch.float32)
    wrong = error(found[1][1], truth).norm
    # With blocks of 1 and 2 the wrong formula and the right one are the same.
    assert wrong < 1e-5 if size <= 2 else wrong > 0.3


def test_several_adapters_are_summed_over_the_input_of_the_layer():
    config = C3AConfig(block_size=2, init_weights="gaussian")
    layer = make(config)
    layer.add_adapter("same", config)
    layer.add_adapter("other", C3AConfig(block_size=1, init_weights="gaussian"))
    names = ["default", "same", "other"]
    layer.set_adapter(names)
    x = torch.randn(3, I)
    assert_close(layer(x), reference(layer, x, names), torch.float32)
    # Where PEFT feeds the second adapter with what the first one returns, which only a square layer can do.
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(I, I)), peft.C3AConfig(block_size=2, init_weights="gaussian", target_modules=["0"])
    )
    model.add_adapter("same", peft.C3AConfig(block_size=2, init_weights="gaussian", target_modules=["0"]))
    theirs = model.base_model.model[0]
    theirs.set_adapter(names[:2])
    expected = theirs.base_layer(x).double() + sum(
        x.double() @ circulant.dense(theirs.c3a_kernel[name].detach().double()).T / I for name in names[:2]
    )
    assert error(theirs(x), expected).norm > 1e-2


def test_a_file_of_several_block_sizes_goes_to_peft_and_back(tmp_path):
    torch.manual_seed(0)
    base = MLP()
    config = C3AConfig(block_size=4, block_size_pattern={"second": 2}, target_modules=["first", "second"])
    ours = get_peft_model(copy.deepcopy(base), config)
    x = torch.randn(3, 12)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(ours(x), theirs(x).double(), torch.float32)
    assert torch.equal(ours(x), again(x))
    assert [again.get_submodule(f"base_model.model.{n}").block_size for n in ("first", "second")] == [
        {"default": 4},
        {"default": 2},
    ]


def test_a_block_size_that_does_not_divide_names_those_that_would():
    with pytest.raises(ValueError, match=r"block_size: 4 does not divide.*12 inputs and 10 outputs.*one of 1, 2$"):
        make(C3AConfig(block_size=4))
    config = C3AConfig(block_size=2, block_size_pattern={"first": 3}, target_modules=["first", "second"])
    with pytest.raises(ValueError, match=r"block_size_pattern\['first'\]: 3 does not divide.*'first'.*one of 1, 2, 4"):
        get_peft_model(MLP(), config)
    config = C3AConfig(block_size=4, block_size_pattern={"third": 2}, target_modules=["first", "second"])
    with pytest.warns(UserWarning, match=r"block_size_pattern.*'third'"):
        get_peft_model(MLP(), config)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size"),
        ({"block_size": 2.0}, TypeError, "block_size"),
        ({"block_size": True}, TypeError, "block_size"),
        ({"init_weights": "zeros"}, ValueError, "init_weights"),
        ({"init_weights": None}, ValueError, "init_weights"),
        ({"bias": "lora_only"}, ValueError, "bias"),
        ({"block_size_pattern": [3]}, TypeError, "block_size_pattern"),
        ({"block_size_pattern": {"a": 0}}, ValueError, r"block_size_pattern\['a'\]"),
        ({"block_size_pattern": {"(": 2}}, ValueError, "block_size_pattern"),
        ({"block_size_pattern": {1: 2}}, TypeError, "block_size_pattern"),
    ],
)
def test_bad_fields_are_refused_by_name(values, error, message):
    with pytest.raises(error, match=message):
        C3AConfig(**values)


def test_fields_are_those_of_peft():
    assert set(C3AConfig().to_dict()) == set(peft.C3AConfig().to_dict())


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2)])
def test_larger_and_grouped_convolutions_are_refused(conv):
    with pytest.raises(ValueError, match=r"'a\.b'.*kernel_size.*groups"):
        C3AConv2d(conv, C3AConfig(block_size=2), module_name="a.b")


@pytest.mark.parametrize("conv", [False, True])
def test_a_young_adapter_is_not_lost_in_a_half_precision_weight(conv):
    torch.manual_seed(0)
    base = nn.Conv2d(64, 64, 1, bias=False) if conv else nn.Linear(64, 64, bias=False)
    base = base.to(torch.bfloat16)
    nn.init.constant_(base.weight, 8.0)
    config = C3AConfig(block_size=16)
    layer = (C3AConv2d if conv else C3ALinear)(base, config)
    half = torch.randn(4, 32)
    x = torch.cat([half, -half], 1).bfloat16()
    x = x[..., None, None] if conv else x
    # A constant weight makes nothing of such an input: all that comes out is the adapter's.
    delta = x.flatten(1).double() @ circulant.dense(layer.c3a_kernel["default"].detach().double()).T / 64
    assert_close(layer(x).flatten(1), delta, torch.bfloat16)
    layer.merge()
    assert bool((base.weight == 8.0).all()), "all of it is below the rounding of the weight"


def test_reading_a_file_of_peft_warns_of_nothing(tmp_path):
    base = MLP()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.C3AConfig(block_size=4, target_modules=["first"]))
    theirs.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize(
    ("targets", "excluded"), [(["first", "second"], ["second"]), ("all-linear", r"second|head\..*")]
)
def test_excluded_modules_stay_out_in_peft_too(targets, excluded, tmp_path):
    base = MLP()
    config = C3AConfig(block_size=2, target_modules=targets, exclude_modules=excluded)
    assert "exclude_modules" not in C3AConfig().to_dict()
    assert C3AConfig.from_dict(config.to_dict()) == config
    ours = get_peft_model(copy.deepcopy(base), config)
    assert [n for n, module in ours.named_modules() if isinstance(module, C3ALinear)] == ["base_model.model.first"]
    ours.save_pretrained(tmp_path)
    x = torch.randn(3, I)
    expected = ours.eval()(x)
    for library in (peft.PeftModel, PeftModel):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = library.from_pretrained(copy.deepcopy(base), str(tmp_path))
        names = [name for name, _ in loaded.named_parameters()]
        assert names == [name for name, _ in ours.named_parameters()]
        assert_close(loaded.eval()(x), expected.double(), torch.float32)
