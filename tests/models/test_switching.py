"""Adapters switched, added, removed and merged between a forward pass and its backward pass."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from support.toy_model import METHODS, Checkpointed, X, lora, toy

from peftk.models.peft_model import get_peft_model
from peftk.nn import AdaLoraConfig
from peftk.testing.compare import assert_close


def adapted(method, base=None):
    """A model with the adapters "default", which is active, and "other"."""
    config = METHODS[method] if isinstance(method, str) else method
    model = get_peft_model(toy() if base is None else base, config)
    torch.manual_seed(1)
    frozen = isinstance(config, AdaLoraConfig)
    model.add_adapter("other", dataclasses.replace(config, inference_mode=frozen))
    return model


def parameters(model):
    """Every parameter, held from here: an adapter may be removed from the model."""
    return {name: p for name, p in model.named_parameters() if "ranknum" not in name}


def gradients(found):
    return {name: p.grad.clone() for name, p in found.items() if p.grad is not None}


def loss(model):
    return model(X).square().sum()


def expected_of(model):
    model = copy.deepcopy(model)
    loss(model).backward()
    return gradients(parameters(model))


def disable(model):
    with model.disable_adapter():
        model(X)


def train_the_other(model):
    model.set_adapter("other")
    loss(model).backward()


BETWEEN = {
    "set_adapter": lambda model: model.set_adapter("other"),
    "set_adapter, frozen": lambda model: model.set_adapter("default", inference_mode=True),
    "set_adapter twice": lambda model: [model.set_adapter(name) for name in ("other", "default", "other")],
    "set_adapter and back": lambda model: [model.set_adapter(name) for name in ("other", "default")],
    "set_adapter, both": lambda model: model.set_adapter(["other", "default"]),
    "add_adapter": lambda model: model.add_adapter("third", lora(target_modules=["value"])),
    "delete_adapter": lambda model: model.delete_adapter("default"),
    "delete another": lambda model: model.delete_adapter("other"),
    "disable_adapter": disable,
    "disable": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.filterwarnings("ignore:delete_adapter")
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_that_ran_gets_its_gradient(method, between):
    model = adapted(method)
    expected, held = expected_of(model), parameters(model)
    y = loss(model)
    BETWEEN[between](model)
    y.backward()
    found = gradients(held)
    assert found.keys() == expected.keys() and len(found) >= 3
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_two_adapters_that_ran_one_after_the_other_both_get_theirs(method):
    model = adapted(method)
    expected, held = expected_of(model), parameters(model)
    first = loss(model)
    model.set_adapter("other")
    expected |= expected_of(model)
    (first + loss(model)).backward()
    found = gradients(held)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]), name
    # What is frozen by now gets nothing from later passes, and gradients add up.
    loss(model).backward()
    for name, p in held.items():
        if "default" in name and p.grad is not None:
            assert torch.equal(p.grad, expected[name]), name
    model.set_adapter("default")
    y = loss(model)
    model.set_adapter("other")
    y.backward()
    for name, grad in gradients(held).items():
        assert_close(grad, 2 * expected[name].double(), torch.float32, what=name)


def test_modules_that_are_trained_in_full_get_theirs():
    model = get_peft_model(toy(), lora(modules_to_save=["classifier"], bias="lora_only"))
    model.add_adapter("other", lora(modules_to_save=["classifier"]))
    expected, held = expected_of(model), parameters(model)
    y = loss(model)
    model.set_adapter("other")
    y.backward()
    found = gradients(held)
    assert found.keys() == expected.keys() and any(name.endswith("base_layer.bias") for name in found)
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())


def test_choosing_adapters_leaves_nothing_on_the_parameters():
    model = adapted("lora")
    for name in ("other", "default", "other", "default"):
        model.set_adapter(name)
    assert not any(p._backward_hooks for p in model.parameters())
    with torch.inference_mode():
        model.set_adapter("other")
    loss(model).backward()
    assert all(p.grad is None for name, p in model.named_parameters() if "default" in name)


def merge_and_unmerge(model):
    model.merge_adapter()
    model.unmerge_adapter()


@pytest.mark.parametrize("between", [lambda model: model.merge_adapter(), merge_and_unmerge])
@pytest.mark.parametrize("method", METHODS)
def test_merging_in_between_is_noticed(method, between):
    """The gradient of the input needs the weight that ran."""
    model = adapted(method)
    y = loss(model)
    between(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_passes(method, use_reentrant):
    model, plain = adapted(method, Checkpointed(use_reentrant)), adapted(method)
    expected = expected_of(plain)
    held = {name.replace("model.toy.", "model."): p for name, p in parameters(model).items()}
    y = loss(model)
    model.set_adapter("other")
    model(X)
    model.set_adapter("default")
    disable(model)
    y.backward()
    found = gradients(held)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]), name
    if use_reentrant:
        # Such a pass leaves nothing behind by which a switch could be noticed.
        return
    y = loss(model)
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match="call backward before set_adapter"):
        y.backward()
    model.set_adapter("default")
    y = loss(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"recomputation|inplace"):
        y.backward()
