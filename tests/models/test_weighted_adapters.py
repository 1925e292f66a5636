"""Adapters that are weighted sums of others, beside those of Hugging Face PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
from support.beside_peft import both, trained
from support.toy_model import X, lora, oft, toy

import peftk
from peftk.testing.compare import assert_close

COMBINATIONS = ["linear", "svd", "cat", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_weighted_adapters_are_those_of_peft(kind: str) -> None:
    theirs, ours = both(lora(r=4, lora_alpha=6))
    for model, lib in ((theirs, peft), (ours, peftk)):
        config = lib.LoraConfig(r=4, lora_alpha=2, target_modules=["query", "value"])
        model.add_adapter("b", config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if ".b." in name:
                p.normal_(std=0.3)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    for model in (theirs, ours):
        model.add_weighted_adapter(["default", "b"], [0.7, -0.4], "sum", kind, density=0.5)
        model.set_adapter("sum")
    assert_close(ours(X), theirs(X).detach().double(), torch.float32)
    if kind == "cat":
        layer = ours.base_model.model.layers[0].query
        one, other, found = (layer.get_delta_weight(name) for name in ("default", "b", "sum"))
        assert_close(found, 0.7 * one.double() - 0.4 * other.double(), torch.float32)


def test_the_sum_of_adapters_with_another_scale_is_the_sum() -> None:
    model = trained(peftk.get_peft_model(toy(), lora(r=4, use_rslora=True)))
    model.add_weighted_adapter(["default"], [0.5], "halved", "cat")
    layer = model.base_model.model.layers[0].query
    assert_close(layer.get_delta_weight("halved"), 0.5 * layer.get_delta_weight("default").double(), torch.float32)


def test_weighted_adapters_by_chance_keep_the_mean() -> None:
    model = trained(peftk.get_peft_model(toy(), lora(r=4)))
    torch.manual_seed(0)
    model.add_weighted_adapter(["default"], [1.0], "thin", "dare_linear_svd", density=0.5, svd_rank=12)
    layer = model.base_model.model.layers[0].query
    found, whole = layer.get_delta_weight("thin"), layer.get_delta_weight("default")
    kept = found.abs() > found.abs().max() / 1e4
    assert_close(found[kept], 2 * whole[kept].double(), torch.float32)
    assert 0.2 < kept.float().mean() < 0.8


def test_weighted_adapters_that_do_not_go_together_are_refused() -> None:
    model = peftk.get_peft_model(toy(), lora(r=4))
    model.add_adapter("small", lora(r=2))
    model.add_adapter("dora", lora(use_dora=True))
    model.add_adapter("turned", oft(target_modules=["classifier"]))
    model.add_adapter("pissa", lora(init_lora_weights="pissa"))
    for arguments, text in (
        ((["default", "small"], [1, 1], "new", "linear"), "their ranks differ"),
        ((["default", "dora"], [1, 1], "new"), "'dora' has use_dora"),
        ((["default", "turned"], [1, 1], "new"), "expected LoRA adapters, got 'turned'"),
        ((["default", "pissa"], [1, 1], "new"), "'pissa' has init_lora_weights='pissa'"),
        ((["default"], [1, 1], "new"), "weights: expected 1 numbers"),
        ((["default"], [1], "new", "ties"), "density"),
        ((["default"], [1], "new", "sum"), "combination_type"),
        ((["nobody"], [1], "new"), "nobody"),
        (([], [], "new"), "at least one"),
        ((["default"], [1], "small"), "exists already"),
    ):
        with pytest.raises(ValueError, match=text):
            model.add_weighted_adapter(*arguments)
    assert "new" not in model.peft_config
