"""diffusers sets the strength of our adapters by its own functions and arguments, which look for PEFT's layers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.peft_utils import set_adapter_layers, set_weights_and_activate_adapters
from peft.tuners.tuners_utils import BaseTunerLayer

import peftk
from peftk import PeftConfig, get_peft_model
from peftk.nn import LAYERS, AdapterLayer

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LINEAR = {layer.config_class for layer in LAYERS if "Linear" in layer.base_kinds}
# Every method that adapts linear layers, with random adapters.
CONFIGS = {
    form.name: kind(
        **form.fields,
        **{"init_lora_weights" if hasattr(kind, "init_lora_weights") else "init_weights": False},
        target_modules=TARGETS,
    )
    for kind in PeftConfig._by_type.values()
    if kind in LINEAR
    for form in kind._forms
    if "Linear" in (form.kinds or ("Linear",))
}
GENERATOR = torch.Generator().manual_seed(0)
X, TEXT = torch.randn(1, 4, 8, 8, generator=GENERATOR), torch.randn(1, 5, 16, generator=GENERATOR)


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


@torch.no_grad()
def run(model, **kwargs):
    return model(X.to(model.dtype), 3, TEXT.to(model.dtype), **kwargs).sample


def set_scales(model, scale, name="default"):
    for _, layer in model.base_model._layers():
        layer.set_scale(name, scale)


@pytest.mark.parametrize("method", [m for m, config in CONFIGS.items() if not getattr(config, "use_dora", False)])
def test_the_scale_of_a_call(method):
    base = run(unet())
    model = get_peft_model(unet(), CONFIGS[method]).eval()
    full = run(model)
    assert (full - base).abs().max() > 1e-3
    off = run(model, cross_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(off, base, rtol=0, atol=1e-6)
    half = run(model, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(run(model), full)
    set_scales(model, 0.5)
    assert torch.equal(run(model), half)
    assert not torch.equal(half, full)


def test_the_magnitudes_of_dora_stay_at_scale_zero():
    def adapted(library):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(8, 6))
        config = library.LoraConfig(r=2, use_dora=True, target_modules=["0"], init_lora_weights=False)
        return library.get_peft_model(base, config).eval()

    ours, theirs = adapted(peftk), adapted(peft)
    theirs.load_state_dict({key: value.clone() for key, value in ours.state_dict().items()})
    x = torch.randn(3, 8)
    for scale in (1.0, 0.5, 0.0):
        for model in (ours, theirs):
            model.base_model.model[0].set_scale("default", scale)
        torch.testing.assert_close(ours(x), theirs(x))
    with ours.disable_adapter():
        assert not torch.allclose(ours(x), theirs(x))


@pytest.mark.parametrize("method", CONFIGS)
def test_fusing_with_a_scale(method):
    # In float64: the attention is sharp where an adapter is large, as that of AdaLoRA is here.
    model = get_peft_model(unet().double(), CONFIGS[method]).eval()
    inner = model.get_base_model()
    set_scales(model, 0.7)
    expected = run(model)
    set_scales(model, 1.0)
    inner.fuse_lora(lora_scale=0.7)
    assert all(layer.merged for _, layer in model.base_model._layers())
    torch.testing.assert_close(run(model), expected)
    inner.unfuse_lora()
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_adapters_chosen_with_weights(method):
    model = get_peft_model(unet(), CONFIGS[method])
    # Only one AdaLoRA adapter of a model can be trained.
    model.add_adapter("other", dataclasses.replace(CONFIGS[method], inference_mode=True))
    model.eval()
    set_weights_and_activate_adapters(model.get_base_model(), ["default", "other"], [0.5, {"down_blocks": 0.0}])
    got = run(model)
    model.set_adapter(["default", "other"])
    for path, layer in model.base_model._layers():
        layer.set_scale("default", 0.5)
        layer.set_scale("other", 0.0 if path.startswith("down_blocks") else 1.0)
    assert torch.equal(run(model), got)
    set_adapter_layers(model.get_base_model(), enabled=False)
    torch.testing.assert_close(run(model), run(unet()), rtol=0, atol=0)


def test_unloading_by_diffusers():
    inner = unet()
    get_peft_model(inner, CONFIGS["LoRA"])
    inner.unload_lora()
    assert not any(isinstance(module, AdapterLayer) for module in inner.modules())
    assert torch.equal(run(inner), run(unet()))


def test_our_layers_pass_for_those_of_peft():
    model = get_peft_model(unet(), CONFIGS["OFT, series"])
    assert all(isinstance(layer, BaseTunerLayer) for _, layer in model.base_model._layers())
    assert BaseTunerLayer not in AdapterLayer.__mro__


LATE = """
import sys, warnings, torch, peftk
class Model(torch.nn.Module):
    def __init__(self): super().__init__(); self.fc = torch.nn.Linear(4, 4)
    def forward(self, x, cross_attention_kwargs=None): return self.fc(x)
model = peftk.get_peft_model(Model(), peftk.LoraConfig(r=2, target_modules=["fc"]))
x = torch.ones(1, 4)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("default")
    for scale in (1.0, 0.5, 0.5):
        model(x, cross_attention_kwargs={"scale": scale})
print(len(told), str(told[0].message))
assert "peft" not in sys.modules and "diffusers" not in sys.modules
from peft.tuners.tuners_utils import BaseTunerLayer
warnings.simplefilter("error")
model(x, cross_attention_kwargs={"scale": 0.5})
assert isinstance(model.base_model.model.fc, BaseTunerLayer)
"""


def test_without_peft_a_scale_is_told_to_be_lost_once():
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 cross_attention_kwargs: scale=0.5 reaches adapters only if"), done.stdout


def test_a_scale_is_told_nothing_where_it_arrives():
    model = get_peft_model(unet(), CONFIGS["LoRA"]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, cross_attention_kwargs={"scale": 0.5})
