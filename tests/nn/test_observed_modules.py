"""Modules of an adapter that somebody hooks, wraps or replaces are called; nobody else pays for a call."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support.layer_cases import CASES, example, make
from torch import nn

from peftk.testing.compare import assert_close

MODULES = {"lora": "lora_B", "lora_bias": "lora_A", "lora_conv1d": "lora_B", "lora_conv": "lora_A", "oft": "oft_R"}


def part(layer, name):
    return getattr(layer, MODULES[name])["default"]


@pytest.mark.parametrize("name", MODULES)
def test_a_hook_that_only_looks_changes_nothing_and_sees_every_call(name):
    layer = make(CASES[name]).eval()
    x = example(CASES[name]).requires_grad_()
    expected = layer(x)
    params = [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(expected.square().sum(), [x, *params])
    calls = []
    handle = part(layer, name).register_forward_hook(lambda *_: calls.append(1))
    y = layer(x)
    assert len(calls) == 1
    assert_close(y, expected.detach().double(), torch.float32)
    for found, true in zip(torch.autograd.grad(y.square().sum(), [x, *params]), grads, strict=True):
        assert_close(found, true.double(), torch.float32)
    handle.remove()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", [n for n in MODULES if n != "oft"])
def test_a_hook_or_another_forward_that_makes_the_adapter_zero(name):
    x = example(CASES[name])
    layer = make(CASES[name]).eval()
    second = layer.lora_B["default"]
    base = layer.base_layer(x)
    handle = second.register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(layer(x), base)
    handle.remove()
    forward = second.forward
    second.forward = lambda value: forward(value) * 0
    assert torch.equal(layer(x), base)
    del second.forward
    assert not torch.equal(layer(x), base)
    wrapped = copy.deepcopy(layer)
    wrapped.lora_B["default"] = nn.Sequential(second, nn.Tanh())
    # What is no linear layer any more is called, and not asked for its weight.
    with pytest.raises(AttributeError):
        _ = wrapped.lora_B["default"].weight
    assert not torch.equal(wrapped(x), layer(x))


FACTORS = ("lora_A", "lora_B", "lora_magnitude_vector")


# Embeddings hold their factors as parameters, which nobody calls.
@pytest.mark.parametrize(
    ("name", "container"),
    [*((n, c) for n in ("dora", "dora_conv1d", "dora_conv") for c in FACTORS), ("dora_embedding", FACTORS[2])],
)
def test_hooks_on_modules_of_dora_are_refused_by_name(name, container):
    layer = make(CASES[name]).eval()
    getattr(layer, container)["default"].register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match=r"DoRA adapter 'default' .*lora_A, lora_B, lora_magnitude_vector"):
        layer(example(CASES[name]))


def test_hooks_on_rotations_of_convolutions_are_refused_by_name():
    layer = make(CASES["oft_conv"]).eval()
    layer.oft_R["default"].register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match=r"oft_R\.default.*convolution"):
        layer(example(CASES["oft_conv"]))


EVERYWHERE = {
    "forward": nn.modules.module.register_module_forward_hook,
    "forward_pre": nn.modules.module.register_module_forward_pre_hook,
    "full_backward": nn.modules.module.register_module_full_backward_hook,
    "full_backward_pre": nn.modules.module.register_module_full_backward_pre_hook,
}
"""What puts a hook on every module of the process."""


@contextlib.contextmanager
def everywhere(kind, hook=lambda *_: None):
    handle = EVERYWHERE[kind](hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", [None, *EVERYWHERE])
@pytest.mark.parametrize("name", ["lora", "lora_conv"])
def test_hooks_are_refused_by_name_in_batches_that_mix_adapters(name, kind):
    """Those on a module of the adapter, whether or not there are others on every module, which are not."""
    layer = make(CASES[name], module_name="a.b").eval()
    x = example(CASES[name])
    with contextlib.nullcontext() if kind is None else everywhere(kind):
        handle = layer.lora_B["default"].register_forward_hook(lambda *_: None)
        with pytest.raises(NotImplementedError, match=r"module 'a.b': .* lora_A or lora_B of 'default'"):
            layer(x, adapter_names=["default"] * len(x))
        handle.remove()
        layer(x, adapter_names=["default"] * len(x))


@pytest.mark.parametrize("kind", EVERYWHERE)
@pytest.mark.parametrize("name", MODULES)
def test_hooks_on_every_module_see_those_of_an_adapter(name, kind):
    layer = make(CASES[name])
    x = example(CASES[name]).requires_grad_()
    expected, seen = layer(x), []
    with everywhere(kind, lambda module, *_: seen.append(module)):
        y = layer(x)
        y.sum().backward()
    assert any(module is part(layer, name) for module in seen)
    assert_close(y, expected.detach().double(), torch.float32)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.base in ("linear", "conv")])
def test_no_names_for_the_samples_are_as_no_argument(name):
    """Hooks on the layer run once, as without it."""
    layer, seen = make(CASES[name]).eval(), []
    x = example(CASES[name])
    expected = layer(x)
    layer.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(layer(x, adapter_names=None), expected)
    assert seen == [1]
