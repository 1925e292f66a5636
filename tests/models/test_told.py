"""What is told where a trained value would be lost, and merging what each layer runs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import peftk
from peftk import LoraConfig, PeftModel, get_peft_model


class Shared(nn.Module):
    """The model calls its embedding by the second of two names, and ties its head to it."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(9, 4)
        self.encoder = nn.Module()
        self.encoder.embed = self.shared
        self.out = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.shared.weight

    def forward(self, x):
        return self.head(self.out(self.encoder.embed(x)))


def test_a_copy_that_the_model_never_calls_is_told():
    config = LoraConfig(r=2, target_modules=["out"], modules_to_save=["shared"])
    with pytest.warns(UserWarning, match=r"module 'shared' is .*encoder\.embed.* too; its trained copy"):
        get_peft_model(Shared(), config)
    with pytest.warns(UserWarning, match=r"module 'head' shares its weight with .*shared\.weight"):
        get_peft_model(Shared(), LoraConfig(r=2, target_modules=["out"], modules_to_save=["head"]))


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def test_statistics_that_training_changed_are_told_at_saving(tmp_path):
    images = 3 * torch.randn(8, 3, 8, 8) + 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(normalised(), LoraConfig(r=2, target_modules=["0", "3"]))
        model.eval()(images)
        model.save_pretrained(tmp_path / "untouched")
    model.train()(images)
    with pytest.warns(UserWarning, match=r"running statistics of \['1'\].*modules_to_save"):
        model.save_pretrained(tmp_path / "changed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = get_peft_model(normalised(), LoraConfig(r=2, target_modules=["0", "3"], modules_to_save=["1"]))
        kept.train()(images)
        kept.save_pretrained(tmp_path / "kept")
    kept.eval()
    again = PeftModel.from_pretrained(normalised(), tmp_path / "kept")
    assert torch.allclose(again(images), kept(images), atol=1e-6)


def test_merging_takes_what_each_layer_runs():
    def config():
        return LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config(), adapter_name="a").eval()
    model.add_adapter("b", config())
    layers = model.get_base_model()
    layers[0].set_adapter(["a", "b"])
    layers[1].set_adapter([])
    x = torch.randn(3, 8)
    y = model(x)
    model.merge_adapter()
    assert layers[0].merged_adapters == ["a", "b"] and layers[1].merged_adapters == []
    assert torch.allclose(model(x), y, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    assert torch.allclose(model.merge_and_unload()(x), y, atol=1e-5)


def test_names_of_the_tuner_hide_nothing_of_the_base_model():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8)])
            self.plan = "mine"
            self.known = {"one"}

        def forward(self, x):
            return self.layers[0](x)

        def commit(self):
            return "committed"

    model = get_peft_model(Base(), LoraConfig(r=2, target_modules=["layers.0"]))
    for holder in (model, model.base_model):
        assert isinstance(holder.layers[0], peftk.nn.LoRALinear)
        assert (holder.plan, holder.known, holder.commit()) == ("mine", {"one"}, "committed")
