"""What a model says about its adapters, beside what Hugging Face PEFT says about the same model."""

from __future__ import annotations

import copy
import dataclasses

import peft
import pytest
import torch
from torch import nn

import peftk
from peftk import LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.head(self.norm(self.second(self.first(x))))


def pair():
    torch.manual_seed(0)
    base = Net()
    values = {"r": 2, "target_modules": ["first", "second"], "modules_to_save": ["head"]}
    models = [
        library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**copy.deepcopy(values)))
        for library in (peftk, peft)
    ]
    for model, library in zip(models, (peftk, peft), strict=True):
        model.add_adapter("other", library.LoraConfig(r=3, target_modules=["second"]))
    return models


def same(ours, theirs):
    ours, theirs = dataclasses.asdict(ours), dataclasses.asdict(theirs)
    for name in ("module_type", "adapter_model_type"):
        ours.pop(name, None)
        theirs.pop(name, None)
    assert ours == theirs


def test_the_status_is_that_of_peft():
    ours, theirs = pair()

    def compare():
        same(ours.get_model_status(), theirs.get_model_status())
        for mine, other in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
            same(mine, other)

    compare()
    for model in (ours, theirs):
        model.set_adapter("other")
    mine, other = ours.get_model_status(), theirs.get_model_status()
    # To PEFT, the head that has no copy for this adapter makes the model inconsistent.
    assert (mine.active_adapters, other.active_adapters) == (["other"], "irregular")
    other.active_adapters = mine.active_adapters
    same(mine, other)
    for model in (ours, theirs):
        model.base_model.disable_adapter_layers()
    assert get_model_status(ours).enabled is False
    for model in (ours, theirs):
        model.base_model.enable_adapter_layers()
        model.set_adapter("default")
        model.merge_adapter()
    # Here too PEFT counts the head, which nothing is merged into.
    merged = [model.get_model_status().merged_adapters for model in (ours, theirs)]
    assert merged == [["default"], "irregular"]


def test_layers_that_disagree_are_irregular():
    ours, _ = pair()
    first = ours.base_model.model.first
    first.enable_adapters(False)
    first.lora_B["default"].weight.requires_grad_(False)
    status = get_model_status(ours)
    assert status.enabled == "irregular"
    assert status.requires_grad == {"default": "irregular", "other": False}
    ours.base_model.model.second.merge()
    assert get_model_status(ours).merged_adapters == "irregular"
    assert get_layer_status(ours)[0].requires_grad["default"] == "irregular"


def test_what_has_no_adapter_has_no_status():
    with pytest.raises(ValueError, match="no adapted layer"):
        get_layer_status(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model"):
        get_model_status("model")
    layer = peftk.nn.LoRALinear(nn.Linear(4, 4), LoraConfig(r=1))
    assert get_model_status(nn.Sequential(layer)).base_model_type == "other"


def test_a_batch_norm_is_trained_and_saved_with_its_counter(tmp_path):
    torch.manual_seed(0)
    base = Net()
    values = {"r": 2, "target_modules": ["first"], "modules_to_save": ["norm"]}
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(**values))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**values))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(8, 6)
    for model in (ours, theirs):
        model(x).sum().backward()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for who in ("ours", "theirs"):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / who, low_cpu_mem_usage=True)
        assert again.base_model.model.norm.num_batches_tracked == 1
        assert torch.equal(again(x), ours.eval()(x))
        other = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / who))
        assert torch.equal(other.eval()(x), theirs.eval()(x))
