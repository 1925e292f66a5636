"""Names of modules in files of every dialect, on tiny models of the classes that published adapters are for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from torch import nn

import peftk
from peftk.models.adapter_source import model_weights, read_source
from peftk.models.convert import convert, plan_for

BLOCKS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1}
BLOCKS |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (8, 16), "norm_num_groups": 4}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj", "ff.net.0.proj"]

MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "SD 1.5": (
        lambda: diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=8, attention_head_dim=4, **BLOCKS),
        UNET,
    ),
    "SDXL": (
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            cross_attention_dim=8,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            **XL,
            **BLOCKS,
        ),
        UNET,
    ),
    "Flux": (
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        ["to_q", "add_k_proj", "to_out.0", "ff.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out", "norm.linear"],
    ),
    "SD3": (
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            out_channels=4,
        ),
        ["to_q", "add_v_proj", "to_add_out", "ff.net.2", "norm1.linear"],
    ),
    "Wan": (
        lambda: diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
        ),
        ["attn1.to_q", "attn2.to_k", "to_out.0", "ffn.net.0.proj", "patch_embedding"],
    ),
    "Qwen-Image": (
        lambda: diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        ["to_q", "add_q_proj", "img_mod.1", "txt_mlp.net.2", "proj_out"],
    ),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


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
