"""Adapter files turned into those of other programs: the same outputs there, and the same bits when turned back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.foreign_files import COMBINATIONS, FORMS, LAYERS, ROTATIONS, X, by_lycoris, net, trained
from torch import Tensor, nn

import peftk
from peftk.checkpoint.container import CheckpointError
from peftk.models.adapter_source import read_source
from peftk.models.convert import convert
from peftk.models.convert_plan import DIALECTS, plan_for
from peftk.testing.compare import assert_close

WEIGHTS = {name: module.weight.shape for name, module in net().named_modules() if hasattr(module, "weight")}
CONFIGS: dict[str, Any] = {
    "lora": peftk.LoraConfig(r=3, lora_alpha=5, target_modules=["first", "conv_in", "point"]),
    "rslora": peftk.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["first", "conv_in", "sequence"]),
    "patterns": peftk.LoraConfig(
        r=2, rank_pattern={"conv_in": 4}, alpha_pattern={"first": 7}, target_modules=["first", "conv_in", "volume"]
    ),
    "dora": peftk.LoraConfig(r=2, use_dora=True, target_modules=["first", "conv_in"]),
    "dora inputs": peftk.LoraConfig(r=2, use_dora=True, dora_inputs=True, target_modules=["first", "conv_in"]),
    "loha, dora": peftk.LoHaConfig(r=2, use_dora=True, target_modules=["first", "conv_in"]),
    "loha, dora inputs": peftk.LoHaConfig(r=2, use_dora=True, dora_inputs=True, target_modules=["first", "conv_in"]),
    "lokr, dora inputs": peftk.LoKrConfig(r=1, use_dora=True, dora_inputs=True, target_modules=["first", "conv_in"]),
    "loha": peftk.LoHaConfig(r=2, alpha=3, target_modules=["first", "conv_in", "point"]),
    "loha, core": peftk.LoHaConfig(r=2, use_effective_conv2d=True, target_modules=["conv_in"]),
    "lokr": peftk.LoKrConfig(r=1, alpha=3, target_modules=["first", "conv_in"]),
    "lokr, whole": peftk.LoKrConfig(r=64, alpha=32, target_modules=["first"]),
    "lokr, both": peftk.LoKrConfig(r=1, decompose_both=True, decompose_factor=2, target_modules=["first"]),
    "output oft": peftk.OutputOFTConfig(
        block_size=2, use_rescale=True, constraint=0.1, target_modules=["first", "conv_in"]
    ),
    "output boft": peftk.OutputOFTConfig(block_size=2, butterfly_factors=2, target_modules=["first", "conv_in"]),
}


def saved(config: Any, folder: Path) -> Tensor:
    """Save a trained adapter as PEFT does, and return its output."""
    model = peftk.get_peft_model(net(), config).eval()
    trained(nn.ParameterList(p for n, p in model.named_parameters() if p.requires_grad))
    model.save_pretrained(folder)
    return model(X).detach()


def turned(source: Path, out: Path, dialect: str, **options: Any) -> list[tuple[str, float]]:
    read = read_source(source)
    return convert(read, plan_for(read, dialect, **options), out)


def contents(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], list[Any]]], dict[str, str]]:
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    with safe_open(file, "pt") as opened:
        metadata = {k: v for k, v in (opened.metadata() or {}).items() if not k.startswith("peftk_")}
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
    found = {k: (str(t.dtype), tuple(t.shape), t.flatten().view(torch.uint8).tolist()) for k, t in tensors.items()}
    return found, metadata


@pytest.mark.parametrize("dialect", [name for name in DIALECTS if name != "peft"])
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_of_peft_run_in_every_dialect_that_has_them(name: str, dialect: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "peft", tmp_path / "other.safetensors"
    expected = saved(CONFIGS[name], folder)
    of_kind = (peftk.LoraConfig, peftk.LoKrConfig) if dialect == "diffusers" else (peftk.LoraConfig,)
    if dialect in ("kohya", "diffusers") and not isinstance(CONFIGS[name], of_kind):
        with pytest.raises(CheckpointError, match=r"is not written by (kohya|diffusers)"):
            turned(folder, out, dialect)
        assert not out.exists()
        return
    if dialect == "comfyui" and name.startswith("output"):
        with pytest.raises(CheckpointError, match="ComfyUI bounds rotations by another constraint"):
            turned(folder, out, dialect)
        return
    if dialect == "diffusers" and "dora" in name and name != "dora":
        with pytest.raises(CheckpointError, match="diffusers has no magnitudes"):
            turned(folder, out, dialect)
        return
    if name.startswith("lo") and "dora" in name:
        # Flattened filters look like those of a linear layer.
        with pytest.raises(CheckpointError, match=r"its magnitudes have the dimensions of the weight.* pass --model"):
            turned(folder, out, dialect)
    compared = turned(folder, out, dialect, weights=WEIGHTS)
    assert len(compared) == len(CONFIGS[name].target_modules)
    # Names of kohya with what only LyCORIS has in them are those of LyCORIS, and its plain LoRA is as that of kohya.
    told = {"kohya", "LyCORIS"} if dialect in ("kohya", "lycoris") else {DIALECTS[dialect]}
    assert read_source(out).dialect in told
    model = peftk.PeftModel.from_pretrained(net(), out)
    assert_close(model(X), expected.double(), torch.float32)
    if name in ("lokr, whole", "output boft"):
        # Its scale was multiplied into a factor; LyCORIS has more stages, which are the identity.
        return
    turned(out, tmp_path / "back", "peft", weights=WEIGHTS)
    assert contents(tmp_path / "back") == contents(folder)
    configs = [json.loads((one / "adapter_config.json").read_text()) for one in (folder, tmp_path / "back")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dialect", ["peft", "comfyui", "diffusers", "kohya"])
@pytest.mark.parametrize(("form", "layers"), COMBINATIONS)
def test_files_of_lycoris_run_in_every_dialect_that_has_them(
    form: str, layers: str, dialect: str, tmp_path: Path
) -> None:
    path, out = tmp_path / "lycoris.safetensors", tmp_path / "other"
    expected = by_lycoris(path, LAYERS[layers], **FORMS[form])
    of_lora = form.startswith("locon")
    whole = layers == "sequence" and any(key.endswith("lokr_w2") for key in load_file(path))
    turns = dialect == "comfyui" and form in ROTATIONS
    of_kind = of_lora or (
        dialect == "diffusers" and form.startswith(("lokr", "full")) and "dora" not in form and not whole
    )
    # Nothing else has magnitudes of inputs but what reads LyCORIS' own names.
    of_kind = of_kind and not (dialect == "diffusers" and "inputs" in form)
    if (dialect in ("kohya", "diffusers") and not of_kind) or (dialect == "peft" and whole) or turns:
        with pytest.raises(CheckpointError):
            turned(path, out, dialect, weights=WEIGHTS)
        assert not out.exists()
        return
    compared = turned(path, out, dialect, weights=WEIGHTS)
    assert all(apart == 0 for _, apart in compared)
    if whole:
        return
    assert_close(peftk.PeftModel.from_pretrained(net(), out)(X), expected.double(), torch.float32)
    turned(out, tmp_path / "back.safetensors", "lycoris", weights=WEIGHTS)
    assert contents(tmp_path / "back.safetensors") == contents(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_lycoris_reads_what_is_written_for_it(name: str, tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris")
    expected = saved(CONFIGS[name], tmp_path / "peft")
    turned(tmp_path / "peft", tmp_path / "file.safetensors", "lycoris", weights=WEIGHTS)
    model = net()
    if "inputs" in name:
        # Its reader makes magnitudes of outputs whatever a file holds, its own files of inputs included.
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "file.safetensors"), model)
        return
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "file.safetensors"), model)
    network.apply_to()
    assert len(network.loras) == len(CONFIGS[name].target_modules)
    assert_close(model(X), expected.double(), torch.float32)


@pytest.mark.parametrize("name", ["lora", "rslora", "patterns", "dora", "loha", "lokr"])
def test_peft_reads_what_is_written_for_it(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    expected = saved(CONFIGS[name], tmp_path / "ours")
    turned(tmp_path / "ours", tmp_path / "file.safetensors", "lycoris")
    # Without what it was made from, so that it is not only put back.
    tensors = load_file(tmp_path / "file.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    turned(tmp_path / "bare.safetensors", tmp_path / "theirs", "peft", weights=WEIGHTS)
    assert_close(peft.PeftModel.from_pretrained(net(), tmp_path / "theirs").eval()(X), expected.double(), torch.float32)


def tiny_unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


@pytest.mark.parametrize("use_dora", [False, True])
def test_diffusers_reads_what_is_written_for_it(use_dora: bool, tmp_path: Path) -> None:
    base = tiny_unet()
    config = peftk.LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_q", "to_v", "conv1"], rank_pattern={"to_v": 3}, use_dora=use_dora
    )
    model = peftk.get_peft_model(base, config).eval()
    trained(nn.ParameterList(p for p in model.parameters() if p.requires_grad))
    model.save_pretrained(tmp_path / "peft")
    inputs = torch.linspace(-1, 1, 256).view(1, 4, 8, 8), torch.tensor(3), torch.linspace(0, 1, 24).view(1, 3, 8)
    with torch.no_grad():
        expected = model(*inputs).sample
        turned(tmp_path / "peft", tmp_path / "file.safetensors", "diffusers", component="unet")
        theirs = tiny_unet()
        before = theirs(*inputs).sample
        # Without the name it reads no metadata, where its own files have the alpha too.
        theirs.load_lora_adapter(str(tmp_path), weight_name="file.safetensors", prefix="unet")
        after = theirs.eval()(*inputs).sample
    assert (before - expected).abs().max() > 1e-3
    assert_close(after, expected.double(), torch.float32)


def lora(name: str, rank: int = 2, **more: Tensor) -> dict[str, Tensor]:
    down, up = torch.randn(rank, 12), torch.randn(16, rank)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, **more}


FAULTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "alpha of zero": (lora("lora_unet_first", **{"lora_unet_first.alpha": torch.tensor(0.0)}), "alpha: expected a"),
    "ranks that disagree": (
        {**lora("lora_unet_first"), "lora_unet_first.lora_up.weight": torch.randn(16, 3)},
        "expected tensors of one rank",
    ),
    "a module without a factor": ({"lora_unet_first.lora_down.weight": torch.randn(2, 12)}, "missing"),
    "several dialects": (lora("lora_unet_first") | lora("unet.second"), "dialects: "),
    "a key of no module": (lora("lora_unet_first", extra=torch.ones(1)), "leave it out with --drop"),
    "no adapter": ({"weight": torch.ones(2)}, "expected an adapter of"),
    "NaN": (lora("lora_unet_first", **{"lora_unet_first.alpha": torch.tensor(torch.nan)}), "finite"),
    "magnitudes of neither outputs nor inputs": (
        lora("lora_unet_first", **{"lora_unet_first.dora_scale": torch.ones(1, 11)}),
        "dora_scale: expected one number for each of the 16 outputs or the 12 inputs",
    ),
    "OFT of few blocks": ({"lora_unet_first.oft_blocks": torch.zeros(2, 8, 8)}, "LyCORIS has no fewer blocks"),
    "GLoRA": ({f"lora_unet_first.{n}.weight": torch.zeros(4, 4) for n in ("a1", "a2", "b1", "b2")}, "no counterpart"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_turned_is_named_and_nothing_is_written(fault: str, tmp_path: Path) -> None:
    tensors, message = FAULTS[fault]
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        turned(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "lycoris")
    assert str(tmp_path / "in.safetensors") in str(error.value)
    assert [one.name for one in tmp_path.iterdir()] == ["in.safetensors"]


def test_names_without_dots_need_the_model(tmp_path: Path) -> None:
    save_file(lora("lora_unet_block_conv_in"), tmp_path / "in.safetensors")
    source = read_source(tmp_path / "in.safetensors")
    with pytest.raises(CheckpointError, match="written with underscores for dots; pass --model"):
        plan_for(source, "diffusers")
    with pytest.raises(CheckpointError, match="the model has no module of this name"):
        plan_for(source, "diffusers", weights={"other": torch.Size((16, 12))})
    both = {"block.conv.in": torch.Size((16, 12)), "block.conv_in": torch.Size((16, 12))}
    with pytest.raises(CheckpointError, match=r"fits block\.conv\.in and block\.conv_in"):
        plan_for(source, "diffusers", weights=both)
    save_file(lora("unet.a_b.c") | lora("unet.a.b_c"), tmp_path / "dots.safetensors")
    with pytest.raises(CheckpointError, match="2 modules would have it"):
        plan_for(read_source(tmp_path / "dots.safetensors"), "kohya")


def test_several_models_are_told_apart(tmp_path: Path) -> None:
    save_file(lora("unet.first") | lora("text_encoder.fc") | lora("text_encoder_2.fc"), tmp_path / "in.safetensors")
    turned(tmp_path / "in.safetensors", tmp_path / "kohya.safetensors", "kohya")
    names = {key.split(".")[0] for key in load_file(tmp_path / "kohya.safetensors")}
    assert names == {"lora_unet_first", "lora_te1_fc", "lora_te2_fc"}
    source = read_source(tmp_path / "in.safetensors")
    with pytest.raises(CheckpointError, match=r"component: .* text_encoder \(1 modules\), .*; choose with --component"):
        plan_for(source, "peft")
    with pytest.raises(CheckpointError, match="ComfyUI reads text encoders with kohya's names"):
        plan_for(source, "comfyui")
    plan = plan_for(source, "peft", component="text_encoder_2")
    assert [target for _, target, _ in plan.rows if target] == [
        "base_model.model.fc.lora_A.weight",
        "base_model.model.fc.lora_B.weight",
    ]
    left = {note for _, target, note in plan.rows if not target}
    assert left == {"of unet, and text_encoder_2 was asked for", "of text_encoder, and text_encoder_2 was asked for"}


def test_arguments(tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    save_file(lora("unet.first", extra=torch.ones(1)), path)
    source = read_source(path)
    with pytest.raises(ValueError, match="dialect: expected one of peft, kohya"):
        plan_for(source, "webui")
    with pytest.raises(ValueError, match="component: expected one of unet"):
        plan_for(source, "kohya", component="vae")
    with pytest.raises(CheckpointError, match="--drop 'gone': no key is like that"):
        plan_for(source, "kohya", drop=["ext*", "gone"])
    with pytest.raises(CheckpointError, match="--drop has some of its keys, and needs all or none"):
        plan_for(source, "kohya", drop=["ext*", "*.lora_up.*"])
    plan = plan_for(source, "kohya", drop=["ext*"])
    assert ("extra", "", "left out, as asked for") in plan.rows
    with pytest.raises(ValueError, match="another place than that of the source"):
        convert(source, plan, path, force=True)
    (tmp_path / "there").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        convert(source, plan, tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    convert(source, plan, tmp_path / "there", force=True)
    assert len(load_file(tmp_path / "there")) == 3
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="expected a file"):
        convert(source, plan, tmp_path / "folder", force=True)
    with pytest.raises(ValueError, match="in a folder that is there"):
        convert(source, plan, tmp_path / "nowhere" / "file")


@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError("x", "y")])
def test_what_is_not_the_same_leaves_nothing(error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftk.models import convert as module

    save_file(lora("unet.first"), tmp_path / "in.safetensors")
    source = read_source(tmp_path / "in.safetensors")
    plan = plan_for(source, "kohya")

    def broken(*_: object, **options: object) -> float:
        raise error

    monkeypatch.setattr(module, "difference", broken)
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        convert(source, plan, tmp_path / "out.safetensors")
    monkeypatch.setattr(module, "difference", lambda *_, **options: 1e-3)
    with pytest.raises(CheckpointError, match=r"its update would be 1\.0e-03 from what it is"):
        convert(source, plan, tmp_path / "out.safetensors")
    assert [one.name for one in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_core_is_multiplied_into_the_first_factor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "lora_unet_block_conv_in"
    down, core, up = torch.randn(2, 4, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(8, 2, 1, 1)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": core, f"{name}.lora_up.weight": up}
    save_file(tensors, tmp_path / "in.safetensors")
    turned(tmp_path / "in.safetensors", tmp_path / "out", "peft", weights=WEIGHTS)
    x = torch.randn(1, 4, 5, 5)
    conv = nn.functional.conv2d
    layer = net().block["conv_in"]
    expected = layer(x).double() + conv(conv(conv(x.double(), down.double()), core.double(), padding=1), up.double())
    for file in ("in.safetensors", "out"):
        model = peftk.PeftModel.from_pretrained(net(), tmp_path / file)
        assert_close(model.base_model.model.block["conv_in"](x), expected, torch.float32)


def test_paths_that_begin_as_names_of_other_dialects(tmp_path: Path) -> None:
    """As those of GPT-2 do, beside a module that does not."""
    weights = {"transformer.h.0": torch.Size((16, 12)), "score": torch.Size((16, 12))}
    save_file(lora("lora_unet_transformer_h_0") | lora("lora_unet_score"), tmp_path / "in.safetensors")
    turned(tmp_path / "in.safetensors", tmp_path / "out", "peft", weights=weights)
    names = {key.split(".lora_")[0] for key in load_file(tmp_path / "out" / "adapter_model.safetensors")}
    assert names == {"base_model.model.transformer.h.0", "base_model.model.score"}


@pytest.mark.parametrize(
    "change",
    [
        {"x": [1.0, [1 << 40], "float32"]},
        {"x": [1.0, [1], "Tensor"]},
        {"x": ["gone", [1]]},
        {"x": 3},
        {"x": [1.0, "1", "float32"]},
    ],
    ids=str,
)
def test_what_a_file_says_of_its_origin_is_not_trusted(change: dict[str, Any], tmp_path: Path) -> None:
    from peftk.checkpoint.writer import write_safetensors
    from peftk.models.adapter_source import PROVENANCE

    save_file(lora("lora_unet_first"), tmp_path / "in.safetensors")
    source = read_source(tmp_path / "in.safetensors")
    plan = plan_for(source, "lycoris")
    origin = json.loads(plan.metadata[PROVENANCE])
    origin["tensors"] |= change
    with (tmp_path / "edited.safetensors").open("wb") as stream:
        write_safetensors(stream, plan.tensors, plan.metadata | {PROVENANCE: json.dumps(origin)})
    with pytest.raises(CheckpointError, match="metadata peftk_source: not what peftk writes"):
        plan_for(read_source(tmp_path / "edited.safetensors"), "kohya")
