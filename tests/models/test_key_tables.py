"""Names of modules in files of every dialect, on tiny models of the classes that published adapters are for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from support.diffusion_models import MODELS, made
from torch import nn

import peftk
from peftk.models.adapter_source import model_weights, read_source
from peftk.models.convert import convert
from peftk.models.convert_plan import plan_for


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the adapter by the names of the model's modules, whoever holds it."""
    found = {}
    for key, value in model.state_dict().items():
        if ".lora_" in key:
            path = key.removeprefix("base_model.model.").split(".lora_")
            found[path[0], path[1][0]] = value
    return found


@pytest.mark.parametrize("dialect", ["kohya", "lycoris", "diffusers", "comfyui"])
@pytest.mark.parametrize("name", MODELS)
def test_every_module_finds_its_place_again(name: str, dialect: str, tmp_path: Path) -> None:
    base: Any = made(name)
    base.save_pretrained(tmp_path / "base")
    component = "unet" if isinstance(base, diffusers.UNet2DConditionModel) else "transformer"
    config = peftk.LoraConfig(r=2, lora_alpha=3, target_modules=MODELS[name][1], init_lora_weights=False)
    model = peftk.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "peft")
    expected = factors(model)
    adapted = {path for path, _ in expected}
    assert all(any(path.endswith(target) for path in adapted) for target in config.target_modules)
    source = read_source(tmp_path / "peft")
    out = tmp_path / "out" / "weights.safetensors"
    out.parent.mkdir()
    compared = convert(source, plan_for(source, dialect, component=component), out)
    assert len(compared) == len(adapted) and all(apart == 0 for _, apart in compared)
    loaded = factors(peftk.PeftModel.from_pretrained(made(name), out))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    # And back, by the names in the model's files.
    again = read_source(out)
    convert(again, plan_for(again, "peft", weights=model_weights(tmp_path / "base")), tmp_path / "back")
    back = factors(peftk.PeftModel.from_pretrained(made(name), tmp_path / "back"))
    assert back.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in back.items())
    if dialect == "diffusers":
        theirs: Any = made(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.load_lora_adapter(str(out.parent), weight_name=out.name, prefix=component)
        read = factors(theirs)
        assert read.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in read.items())
        scales = {m.scaling[next(iter(m.scaling))] for m in theirs.modules() if hasattr(m, "scaling")}
        assert scales == {1.5}
