"""What an adapted model answers to names, attributes and positions, and what it leaves to its base model."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.toy_model import toy
from torch import nn

import peftk
from peftk.nn.adaption_prompt.attention import AdaptedAttention
from peftk.nn.base.saved import ModulesToSaveWrapper
from peftk.nn.xlora.layer import Gates


def lora(**fields):
    return peftk.LoraConfig(**{"r": 2, "target_modules": ["query"]} | fields)


def two_copies():
    model = peftk.get_peft_model(toy(), lora(modules_to_save=["value"]))
    # One name is a part of the other: "in" on a string would find both.
    model.add_adapter("default2", lora(modules_to_save=["value"]))
    return next(m for m in model.modules() if isinstance(m, ModulesToSaveWrapper))


def test_a_wrapper_takes_a_name_as_well_as_a_list_of_names():
    wrapper = two_copies()
    for given in ("default2", ["default2"]):
        wrapper.set_adapter("default")
        wrapper.set_adapter(given)
        assert wrapper.active_adapters == ["default2"]
        assert wrapper.current() is wrapper.modules_to_save["default2"]
        assert wrapper.check_set_adapter(given) == ["default2"]
    wrapper.set_requires_grad("default", False)
    wrapper.set_requires_grad("default2", True)
    trained = {name: {p.requires_grad for p in m.parameters()} for name, m in wrapper.modules_to_save.items()}
    assert trained == {"default": {False}, "default2": {True}}


def test_a_name_is_never_read_letter_by_letter(tmp_path):
    model = peftk.get_peft_model(toy(), lora())
    model.add_adapter("b", lora())
    model.set_adapter("b")
    assert model.active_adapters == ["b"]
    model.base_model.set_requires_grad("b", False)
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    model.save_pretrained(tmp_path, selected_adapters="b")
    assert {path.name for path in tmp_path.iterdir()} == {"b", "README.md"}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match="expected a list of adapter names, got 'b'"):
            merge(adapter_names="b")
    with pytest.raises(TypeError, match="expected a list with one name for each sample"):
        model.eval()(None, adapter_names="b")
    with pytest.raises(TypeError, match="experts: expected a list of names"):
        Gates(None, "01")
    prompts = AdaptedAttention.__new__(AdaptedAttention)
    nn.Module.__init__(prompts)
    prompts._names = ["other", "o", "t"]
    prompts.check_set_adapter("other")
    with pytest.raises(TypeError, match="modules_to_save"):
        lora(modules_to_save="value")


def properties(owner):
    return [name for name, found in inspect.getmembers(type(owner)) if isinstance(found, property)]


@pytest.mark.parametrize("emptied", [False, True])
def test_no_property_raises_anything_but_attribute_error(emptied):
    model = peftk.get_peft_model(toy(), lora(modules_to_save=["value"]))
    if emptied:
        model.delete_adapter("default")
    for module in model.modules():
        for name in properties(module):
            hasattr(module, name)
        inspect.getmembers(module)
    assert not hasattr(model.base_model, "rankallocator")
    assert hasattr(model, "active_peft_config") is not emptied


def test_a_trace_is_that_of_the_model(tmp_path):
    model = peftk.get_peft_model(nn.Sequential(nn.Linear(8, 8)), lora(target_modules=["0"])).eval()
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    x = torch.randn(2, 8)
    traced = torch.jit.trace(model, x)
    traced.save(tmp_path / "traced.pt")
    for run in (traced, torch.jit.load(tmp_path / "traced.pt")):
        assert torch.equal(run(x), model(x))
    grads = [
        torch.autograd.grad(run(x).square().sum(), [p for p in run.parameters() if p.requires_grad])
        for run in (model, traced)
    ]
    assert len(grads[0]) == 2
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_objects_that_are_not_filled_yet_have_no_attributes():
    for cls in (peftk.PeftModel, peftk.models.adapters.Tuner, peftk.models.xlora.XLoraModel):
        empty = cls.__new__(cls)
        for name in (*properties(empty), "anything"):
            assert not hasattr(empty, name)


def test_what_needs_adalora_says_so():
    model = peftk.get_peft_model(toy(), lora())
    for call in (model.orthogonality_loss, lambda: model.update_and_allocate(0)):
        with pytest.raises(ValueError, match="no adapter of this model is a trainable AdaLoRA adapter"):
            call()


def kinds(function):
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize(
    "name", ["__init__", "from_pretrained", "load_adapter", "add_adapter", "save_pretrained", "set_adapter"]
)
def test_positions_are_those_of_peft(name):
    peft = pytest.importorskip("peft")
    ours, theirs = (kinds(getattr(lib.PeftModel, name)) for lib in (peftk, peft))
    assert ours == theirs[: len(ours)]


def test_positions_of_the_tuner_and_of_get_peft_model_are_those_of_peft():
    peft = pytest.importorskip("peft")
    for name in ("merge_adapter", "merge_and_unload", "delete_adapter", "unload"):
        ours, theirs = (kinds(getattr(cls, name)) for cls in (peftk.PeftModel, peft.LoraModel))
        assert ours == theirs[: len(ours)]
    assert kinds(peftk.get_peft_model) == kinds(peft.get_peft_model)


def test_an_argument_too_many_is_refused(tmp_path):
    model = peftk.get_peft_model(toy(), lora())
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="positional"):
        model.load_adapter(tmp_path, "other", False, "cpu", True, False, False, None, "more")
    with pytest.raises(TypeError, match="foo: expected no such argument"):
        peftk.PeftModel.from_pretrained(toy(), tmp_path, "default", False, None, foo=1)


class Answers(nn.Module):
    """A base model with methods of the names that PEFT's models have."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)

    def forward(self, x):
        return self.query(x)

    def push_to_hub(self, name):
        raise AssertionError("the base model was pushed")

    subtract_mutated_init = create_or_update_model_card = push_to_hub


def test_the_base_model_does_not_answer_for_peft():
    model = peftk.get_peft_model(Answers(), lora())
    for owner in (model, model.base_model):
        for name in ("get_prompt", "subtract_mutated_init"):
            assert not hasattr(owner, name)
            with pytest.raises(AttributeError, match=f"PeftModel has no '{name}': .* peftk lacks it"):
                getattr(owner, name)
    with pytest.raises(AttributeError, match="belongs to X-LoRA"):
        model.get_latest_scalings()
    assert not hasattr(model.base_model, "push_to_hub") and hasattr(model.get_base_model(), "push_to_hub")
    assert type(model).push_to_hub is peftk.PeftModel.push_to_hub


def test_every_public_name_of_peft_is_ours_or_refused():
    peft = pytest.importorskip("peft")
    model = peftk.get_peft_model(Answers(), lora())
    tuners = (peft.LoraModel, peft.AdaLoraModel, peft.tuners.xlora.XLoraModel)
    theirs = {n for c in (peft.PeftModel, *tuners) for n, v in inspect.getmembers(c, callable) if n[0] != "_"}
    theirs -= set(dir(nn.Module))
    # Classes that PEFT keeps as attributes, and what a transformers model answers rightly itself.
    theirs -= {"tuner_layer_cls"}
    missing = [n for n in theirs if not hasattr(model, n) and n not in peftk.models.adapters.ABSENT]
    assert not missing
    assert torch.is_tensor(model(torch.ones(1, 4)))
