"""Files that name modules as the authors of SDXL, Flux, SD3 and Wan did, on diffusers' models, some of them split."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin, WanLoraLoaderMixin
from safetensors.torch import load_file, save_file
from support.diffusion_models import MODELS, WAN, made
from torch import Tensor, nn

import peftk
from peftk.checkpoint.container import CheckpointError
from peftk.checkpoint.original_names import Place, original_names
from peftk.models.adapter_source import read_source
from peftk.models.convert import convert
from peftk.models.convert_plan import plan_for
from peftk.models.foreign_files import peft_folder
from peftk.testing.compare import assert_close

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)
Names = dict[str, Place]


def names_of(model: nn.Module) -> Names:
    return original_names(path for path, module in model.named_modules() if isinstance(module, LAYERS))


def kohya(model: nn.Module, names: Names, rank: int = 2, alpha: float = 3.0) -> dict[str, Tensor]:
    """Return LoRA on all modules of the authors, with kohya's keys."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, (paths, _) in names.items():
        weights = [model.get_submodule(path).weight for path in paths]
        taps = weights[0].shape[2:]
        key = "lora_unet_" + name.replace(".", "_")
        out = sum(weight.shape[0] for weight in weights)
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, weights[0].shape[1], *taps, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, rank, *[1] * len(taps), generator=generator) / 8
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def factors(model: nn.Module, path: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return A, B and the scale of each module that a file is loaded into."""
    from peftk.checkpoint.peft import read_config
    from peftk.checkpoint.reader import read_safetensors

    with peft_folder(model, path) as folder:
        tensors = dict(read_safetensors(Path(folder) / "adapter_model.safetensors").tensors)
        config = read_config(Path(folder))
    found = {}
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        a, b = tensors[key], tensors[f"{name}.lora_B.weight"]
        found[name.removeprefix("base_model.model.")] = a, b, config["lora_alpha"] / config["r"]
    return found


@pytest.mark.parametrize("name", ["SDXL", "SD 1.5", "Flux", "SD3", "Wan"])
def test_the_update_is_the_one_of_the_module_that_was_split(name: str, tmp_path: Path) -> None:
    model = made(name)
    names = names_of(model)
    tensors = kohya(model, names)
    save_file(tensors, tmp_path / "file.safetensors")
    found = factors(model, tmp_path / "file.safetensors")
    assert sorted(found) == sorted(path for place in names.values() for path in place.paths)
    for original, (paths, swapped) in names.items():
        key = "lora_unet_" + original.replace(".", "_")
        expected = 1.5 * (tensors[f"{key}.lora_up.weight"].flatten(1) @ tensors[f"{key}.lora_down.weight"].flatten(1))
        updates = [scale * (b.flatten(1) @ a.flatten(1)) for a, b, scale in (found[path] for path in paths)]
        if swapped:
            expected = torch.cat(expected.chunk(2)[::-1])
        assert_close(torch.cat(updates), expected.double(), torch.float32)
    # Adapters of the file act.
    adapted = peftk.PeftModel.from_pretrained(model, tmp_path / "file.safetensors")
    assert len([key for key in adapted.state_dict() if "lora_A" in key]) == len(found)


@pytest.mark.parametrize(("kinds", "alpha"), [(("double", "single"), 3.0), (("double", "final"), 1.0)])
def test_flux_as_diffusers_reads_it(kinds: tuple[str, ...], alpha: float, tmp_path: Path) -> None:
    """At full width, for which its reader has the sizes written down."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    # It takes the alphas of the last layer as 1.
    names = {n: place for n, place in names_of(model).items() if n.startswith(kinds)}
    assert names_of(model)["final_layer.adaLN_modulation.1"] == Place(("norm_out.linear",), swapped=True)
    tensors = kohya(model, names, rank=1, alpha=alpha)
    save_file(tensors, tmp_path / "file.safetensors")
    found = factors(model, tmp_path / "file.safetensors")
    theirs = FluxLoraLoaderMixin.lora_state_dict(dict(tensors))
    assert len(theirs) == 2 * len(found)
    for path, (a, b, scale) in found.items():
        # It gives those of the last layer names without the prefix.
        name = path if path in ("norm_out.linear", "proj_out") else f"transformer.{path}"
        down, up = (theirs[f"{name}.lora_{which}.weight"] for which in "AB")
        # Some rows and columns of the product tell.
        assert_close(scale * b[-64:] @ a[:, -64:], (up[-64:].double() @ down[:, -64:].double()), torch.float32)


def test_sd3_swaps_the_shift_and_the_scale_of_its_last_norms() -> None:
    names = names_of(made("SD3"))
    assert {place.paths for place in names.values() if place.swapped} == {
        ("norm_out.linear",),
        ("transformer_blocks.1.norm1_context.linear",),
    }
    assert not names["joint_blocks.0.context_block.adaLN_modulation.1"].swapped


@pytest.mark.parametrize("dialect", ["kohya", "ComfyUI"])
def test_wan_as_diffusers_reads_it(dialect: str, tmp_path: Path) -> None:
    model = diffusers.WanTransformer3DModel(**WAN, image_dim=16, added_kv_proj_dim=24)
    names = {name: place for name, place in names_of(model).items() if name.startswith("blocks")}
    assert len(names) == 2 * 12
    tensors = kohya(model, names)
    if dialect == "ComfyUI":
        by_flat = {"lora_unet_" + name.replace(".", "_"): f"diffusion_model.{name}" for name in names}
        tensors = {f"{by_flat[(one := key.partition('.'))[0]]}.{one[2]}": value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "file.safetensors")
    found = factors(model, tmp_path / "file.safetensors")
    theirs = WanLoraLoaderMixin.lora_state_dict(dict(tensors))
    assert len(theirs) == 2 * len(found) == 2 * 2 * 12
    for path, (a, b, scale) in found.items():
        down, up = (theirs[f"transformer.{path}.lora_{which}.weight"] for which in "AB")
        assert_close(scale * b @ a, up.double() @ down.double(), torch.float32)


@pytest.mark.parametrize("name", ["SDXL", "SD 1.5"])
def test_unets_as_diffusers_reads_them(name: str, tmp_path: Path) -> None:
    model = made(name)
    # Diffusers takes these alone from such files.
    blocks = ("input_blocks", "middle_block", "output_blocks")
    names = {n: place for n, place in names_of(model).items() if n.startswith(blocks)}
    names.pop("input_blocks.0.0")
    tensors = kohya(model, names)
    save_file(tensors, tmp_path / "file.safetensors")
    found = factors(model, tmp_path / "file.safetensors")
    theirs, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(tensors), unet_config=model.config)
    assert set(alphas.values()) == {3.0}
    assert len(theirs) == 2 * len(found)
    # It has names of an older form for the layers of attention, which it turns later on.
    plain = {
        re.sub(r"processor\.(to_[a-z]+)_lora", r"\1.lora", key).replace("to_out.lora", "to_out.0.lora"): key
        for key in theirs
    }
    for path, (a, b, _) in found.items():
        for which, factor in (("down", a), ("up", b)):
            assert torch.equal(theirs[plain[f"unet.{path}.lora.{which}.weight"]], factor)


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "LoKr": (
        "is 3 modules here, and LoKr has no factor",
        lambda t: (
            {"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": torch.ones(6, 4)}
            | {"lora_unet_double_blocks_0_img_attn_qkv.lokr_w2": torch.ones(16, 8)}
        ),
    ),
    "rows that are missing": (
        "expected 96 rows, the outputs of 3 modules together",
        lambda t: t | {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(95, 2)},
    ),
    "one magnitude": (
        "dora_scale: expected 96 rows",
        lambda t: t | {"lora_unet_double_blocks_0_img_attn_qkv.dora_scale": torch.ones(())},
    ),
    "magnitudes of inputs": (
        "magnitudes of inputs are those of all outputs",
        lambda t: (
            {k: v for k, v in t.items() if "img_attn_qkv" in k}
            | {"lora_unet_double_blocks_0_img_attn_qkv.dora_scale": torch.ones(1, 32)}
        ),
    ),
    "the same module twice": (
        "has two adapters in the file",
        lambda t: (
            t
            | {"lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight": torch.ones(2, 32)}
            | {"lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight": torch.ones(32, 2)}
        ),
    ),
    "outputs in another order": (
        "has its outputs in another order here, and LoKr has no factor",
        lambda t: (
            {"lora_unet_final_layer_adaLN_modulation_1.lokr_w1": torch.ones(8, 4)}
            | {"lora_unet_final_layer_adaLN_modulation_1.lokr_w2": torch.ones(8, 8)}
        ),
    ),
    "rows of outputs in another order": (
        r"expected 64 rows, got shape \(63, 2\)",
        lambda t: t | {"lora_unet_final_layer_adaLN_modulation_1.lora_up.weight": torch.ones(63, 2)},
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_split_is_named(damage: str, tmp_path: Path) -> None:
    message, change = DAMAGE[damage]
    model = made("Flux")
    save_file(change(kohya(model, names_of(model))), tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=message):
        peftk.PeftModel.from_pretrained(model, tmp_path / "file.safetensors")


def test_loha_with_magnitudes_is_split_by_rows(tmp_path: Path) -> None:
    model = made("Flux").eval()
    generator = torch.Generator().manual_seed(0)
    key, names = "diffusion_model.double_blocks.0.txt_attn.qkv", names_of(model)
    four = {
        f"{key}.hada_w{n}_{ab}": torch.randn(*((96, 2) if ab == "a" else (2, 32)), generator=generator)
        for n in "12"
        for ab in "ab"
    }
    scale = torch.rand(96, 1, generator=generator)
    save_file(four | {f"{key}.dora_scale": scale, f"{key}.alpha": torch.tensor(1.0)}, tmp_path / "file.safetensors")
    paths = names["double_blocks.0.txt_attn.qkv"].paths
    weight = torch.cat([model.get_submodule(path).weight for path in paths]).detach()
    a1, b1, a2, b2 = (four[f"{key}.hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    changed = (weight + 0.5 * (a1 @ b1) * (a2 @ b2)).double()
    changed = changed / changed.norm(dim=1, keepdim=True) * scale
    adapted = peftk.PeftModel.from_pretrained(model, tmp_path / "file.safetensors").merge_and_unload()
    found = torch.cat([adapted.get_submodule(path).weight for path in paths])
    assert_close(found, changed, torch.float32)


def test_models_of_others_have_no_such_names() -> None:
    assert "Qwen-Image" in MODELS
    assert names_of(made("Qwen-Image")) == {}
    assert names_of(nn.Sequential(nn.Linear(2, 2))) == {}


@pytest.mark.parametrize("of_inputs", [False, True])
def test_magnitudes_of_outputs_in_another_order(of_inputs: bool, tmp_path: Path) -> None:
    model = made("Flux").eval()
    key, generator = "lora_unet_final_layer_adaLN_modulation_1", torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(64, 2, generator=generator)
    scale = torch.rand((1, 32) if of_inputs else (64, 1), generator=generator)
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    save_file(tensors | {f"{key}.dora_scale": scale}, tmp_path / "file.safetensors")
    # As the authors have it, and then as diffusers has that.
    weight = model.get_submodule("norm_out.linear").weight.detach()
    changed = (torch.cat(weight.chunk(2)[::-1]) + up @ down).double()
    changed = changed / changed.norm(dim=0 if of_inputs else 1, keepdim=True) * scale
    merged = peftk.PeftModel.from_pretrained(made("Flux"), tmp_path / "file.safetensors").merge_and_unload()
    found = merged.get_submodule("norm_out.linear").weight
    assert_close(found, torch.cat(changed.chunk(2)[::-1]), torch.float32)
    # And there and back.
    assert max(turned(tmp_path / "file.safetensors", tmp_path / "peft", "peft", model)) == 0
    assert max(turned(tmp_path / "peft", tmp_path / "back", "kohya", model, original=True)) == 0
    back = load_file(tmp_path / "back")
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def turned(source: Path, out: Path, dialect: str, model: nn.Module, **options: bool) -> list[float]:
    weights = {path: module.weight.shape for path, module in model.named_modules() if isinstance(module, LAYERS)}
    read = read_source(source)
    return [apart for _, apart in convert(read, plan_for(read, dialect, weights=weights, **options), out)]


@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
@pytest.mark.parametrize("name", ["SDXL", "Flux", "SD3", "Wan"])
def test_converted_to_names_of_diffusers_and_back(name: str, dialect: str, tmp_path: Path) -> None:
    model = made(name).eval()
    tensors = kohya(model, names_of(model))
    save_file(tensors, tmp_path / "kohya.safetensors")
    out = tmp_path / ("out.safetensors" if dialect == "diffusers" else "out")
    assert max(turned(tmp_path / "kohya.safetensors", out, dialect, model)) == 0
    found = factors(model, tmp_path / "kohya.safetensors")
    expected = {path: scale * (b.flatten(1) @ a.flatten(1)) for path, (a, b, scale) in found.items()}
    adapted = peftk.PeftModel.from_pretrained(made(name), out)
    layers = {path: adapted.get_submodule(f"base_model.model.{path}") for path in expected}
    for path, layer in layers.items():
        assert_close(layer.get_delta_weight("default").flatten(1), expected[path].double(), torch.float32)
    turned(out, tmp_path / "back.safetensors", "kohya", model, original=True)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key].flatten(), tensors[key].flatten()) for key in tensors)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dialect", ["kohya", "comfyui"])
def test_layers_with_factors_of_their_own_are_joined(dialect: str, dora: bool, tmp_path: Path) -> None:
    model = made("Flux")
    targets = ["to_q", "to_v", *(["to_k", "proj_mlp"] if dora else [])]
    # Ranks and scales that differ, and parts without an adapter.
    patterns = {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_v": 5}}
    adapted = peftk.get_peft_model(
        model,
        peftk.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False, use_dora=dora, **patterns),
    )
    for key, value in adapted.named_parameters():
        if "magnitude" in key:
            value.data *= torch.rand_like(value) + 0.5
    adapted.save_pretrained(tmp_path / "peft")
    assert max(turned(tmp_path / "peft", tmp_path / "out.safetensors", dialect, made("Flux"), original=True)) < 1e-6
    keys = load_file(tmp_path / "out.safetensors").keys()
    assert {key.rpartition(".lora")[0].replace("_", ".").rpartition(".")[2] for key in keys if ".lora" in key} == {
        "qkv",
        "linear1",
    }
    other = peftk.PeftModel.from_pretrained(made("Flux"), tmp_path / "out.safetensors").merge_and_unload()
    merged = adapted.merge_and_unload()
    for key, value in merged.state_dict().items():
        assert_close(other.state_dict()[key], value.double(), torch.float32, what=key)


def test_what_cannot_be_joined_is_named(tmp_path: Path) -> None:
    model = made("Flux")
    for config, message in (
        (peftk.LoHaConfig(r=2, target_modules=["to_q"]), "LoHa of several layers is none of one layer"),
        (
            peftk.LoraConfig(r=2, use_dora=True, target_modules=["to_q"]),
            "some of its parts have magnitudes and others have none",
        ),
        (
            peftk.LoraConfig(r=2, use_dora=True, dora_inputs=True, target_modules=["to_q"]),
            "magnitudes of its inputs are none of those of the whole",
        ),
    ):
        adapted = peftk.get_peft_model(model, config)
        adapted.save_pretrained(tmp_path / "peft")
        model = adapted.unload()
        with pytest.raises(CheckpointError, match=f"is a part of '.*', and {message}"):
            turned(tmp_path / "peft", tmp_path / "out.safetensors", "comfyui", model, original=True)
    source = read_source(tmp_path / "peft")
    with pytest.raises(ValueError, match=r"original: .* --model tells them; got kohya without it"):
        plan_for(source, "kohya", original=True)
    with pytest.raises(ValueError, match="original: expected diffusers' model of SDXL, Flux, SD3 or Wan"):
        plan_for(source, "kohya", weights={"0": torch.Size((2, 2))}, original=True)
    with pytest.raises(ValueError, match=r"original: .* got diffusers"):
        plan_for(source, "diffusers", weights={}, original=True)


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_joined_has_the_widest_dtype(dora: bool, tmp_path: Path) -> None:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, dtype in (("to_q", torch.float16), ("to_k", torch.float32), ("to_v", torch.bfloat16)):
        key = f"transformer.transformer_blocks.0.attn.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(2, 32, generator=generator).to(dtype)
        tensors[f"{key}.lora_B.weight"] = torch.randn(32, 2, generator=generator).to(dtype)
        if dora:
            tensors[f"{key}.lora_magnitude_vector"] = torch.rand(32, generator=generator).to(dtype)
    save_file(tensors, tmp_path / "in.safetensors")
    assert max(turned(tmp_path / "in.safetensors", tmp_path / "out", "comfyui", made("Flux"), original=True)) == 0
    found = load_file(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert found["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"].shape == (96, 6)
