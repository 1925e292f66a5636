"""Small inputs that other programs write, each of which was once read as something else, or refused with odd words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftk
from peftk.checkpoint.container import CheckpointError
from peftk.models.adapter_source import model_weights, read_source
from peftk.models.convert import convert
from peftk.models.convert_plan import plan_for
from peftk.testing.compare import assert_close

DIALECTS = ["peft", "kohya", "lycoris", "diffusers", "comfyui"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(16, 12)})


def lora(name: str, inputs: int = 16, outputs: int = 12, rank: int = 2, **more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    return {
        f"{name}.lora_down.weight": torch.randn(rank, inputs, generator=generator),
        f"{name}.lora_up.weight": torch.randn(outputs, rank, generator=generator),
        **{f"{name}.{part}": value for part, value in more.items()},
    }


def turned(source: Path, out: Path, dialect: str, **options: Any) -> Path:
    read = read_source(source)
    convert(read, plan_for(read, dialect, **options), out)
    return out


def update(path: Path) -> Tensor:
    return peftk.PeftModel.from_pretrained(net(), path).merge_and_unload()["first"].weight - net()["first"].weight


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_factors_that_start_as_a_part_of_the_weight_are_refused(how: str, dialect: str, tmp_path: Path) -> None:
    config = peftk.LoraConfig(r=2, target_modules=["first"], init_lora_weights=how)
    model = peftk.get_peft_model(net(), config)
    model.save_pretrained(tmp_path / "start")
    before = model.base_model.model["first"].get_delta_weight("default").detach().clone()
    model.base_model.model["first"].lora_B["default"].weight.data += 0.1
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{how}': .* path_initial_model_for_weight"):
        turned(tmp_path / "in", tmp_path / "out", dialect)
    assert not (tmp_path / "out").exists()
    # The way out that it names.
    changed = model.base_model.model["first"].get_delta_weight("default").detach() - before
    model.save_pretrained(tmp_path / "twice", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_close(update(turned(tmp_path / "twice", tmp_path / "out", dialect)), changed.double(), torch.float32)


@pytest.mark.parametrize("field", [{"init_lora_weights": "corda"}, {"use_qalora": True}, {"r": "2"}])
def test_a_configuration_that_is_not_understood_is_named(field: dict[str, Any], tmp_path: Path) -> None:
    peftk.get_peft_model(net(), peftk.LoraConfig(r=2, target_modules=["first"])).save_pretrained(tmp_path / "in")
    config = tmp_path / "in" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | field))
    with pytest.raises(CheckpointError, match=f"adapter_config.json: .*{next(iter(field))}"):
        turned(tmp_path / "in", tmp_path / "out", "kohya")


@pytest.mark.parametrize("pattern", ["first", "^first", "(first|second)", "f.*t", "inner\\.first"])
def test_patterns_in_a_header_mean_what_they_mean_to_peft(pattern: str, tmp_path: Path) -> None:
    tensors = {key.replace("down", "A").replace("up", "B"): value for key, value in lora("unet.first").items()}
    told = {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"second": 5, pattern: 8}}
    save_file(tensors, tmp_path / "file", {"lora_adapter_metadata": json.dumps(told)})
    scale = 1.0 if pattern.startswith("inner") else 4.0
    b, a = tensors["unet.first.lora_B.weight"], tensors["unet.first.lora_A.weight"]
    assert_close(update(tmp_path / "file"), (scale * b @ a).double(), torch.float32)
    assert_close(update(turned(tmp_path / "file", tmp_path / "o", "kohya")), (scale * b @ a).double(), torch.float32)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"lora_alpha": 0}, "alpha: expected a finite number above 0, got 0"),
        ({"lora_alpha": float("inf")}, "alpha: expected a finite number above 0, got inf|not valid JSON"),
        ({"lora_alpha": "x"}, "alpha: expected a number in the metadata"),
        ({"lora_alpha": 2, "alpha_pattern": [1]}, "alpha_pattern: expected an object"),
        ({"lora_alpha": 2, "alpha_pattern": {"(": 1}}, "alpha_pattern: key"),
    ],
)
def test_numbers_in_a_header_are_named(told: dict[str, Any], message: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from peftk.__main__ import app

    tensors = {key.replace("down", "A").replace("up", "B"): value for key, value in lora("unet.first").items()}
    text = json.dumps({f"unet.{name}": value for name, value in told.items()})
    save_file(tensors, tmp_path / "file", {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=message):
        peftk.PeftModel.from_pretrained(net(), tmp_path / "file")
    with pytest.raises(CheckpointError, match=message):
        read_source(tmp_path / "file")
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "file")])
    assert done.exit_code == 1 and f"Error: {tmp_path / 'file'}" in done.output


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float8_e4m3fn, torch.float64])
def test_an_alpha_of_any_dtype_is_taken_and_given_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = lora("lora_unet_first", alpha=torch.tensor(4.0).to(dtype))
    if dtype.itemsize == 1:
        tensors = {key: value.to(dtype) for key, value in tensors.items()}
    save_file(tensors, tmp_path / "file")
    wide = {key: value.float() for key, value in tensors.items()}
    expected = 2 * wide["lora_unet_first.lora_up.weight"] @ wide["lora_unet_first.lora_down.weight"]
    assert_close(update(tmp_path / "file"), expected.double(), torch.float32)
    turned(tmp_path / "file", tmp_path / "peft", "peft", weights={"first": torch.Size((12, 16))})
    back = load_file(turned(tmp_path / "peft", tmp_path / "back", "kohya"))
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype is value.dtype and torch.equal(back[key].double(), value.double())


def test_only_alphas_may_be_integers(tmp_path: Path) -> None:
    save_file(lora("lora_unet_first") | {"lora_unet_first.lora_up.weight": torch.ones(12, 2).long()}, tmp_path / "file")
    for read in (
        lambda: peftk.PeftModel.from_pretrained(net(), tmp_path / "file"),
        lambda: read_source(tmp_path / "file"),
    ):
        with pytest.raises(CheckpointError, match=r"lora_up\.weight': dtype expected floating, got torch.int64"):
            read()


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.ones(0)])
def test_an_alpha_of_several_numbers_is_named(alpha: Tensor, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from peftk.__main__ import app

    save_file(lora("lora_unet_first", alpha=alpha), tmp_path / "file")
    with pytest.raises(CheckpointError, match="alpha: expected one number, got shape"):
        read_source(tmp_path / "file")
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "file")])
    assert done.exit_code == 1 and "alpha: expected one number, got shape" in done.output


def test_two_alphas_and_ranks_of_zero_are_named(tmp_path: Path) -> None:
    one = torch.tensor(1.0)
    for tensors, message in [
        (lora("lora_unet_first", alpha=one, lora_alpha=one.clone()), "alpha and lora_alpha|is there as"),
        (lora("lora_unet_first", rank=0, alpha=one), "rank"),
        ({"lora_unet_first.oft_blocks": torch.ones(3, 3)}, "oft_blocks: expected"),
        ({"lora_unet_first.oft_blocks": torch.tensor(1.0)}, "oft_blocks: expected"),
    ]:
        save_file(tensors, tmp_path / "file")
        with pytest.raises(CheckpointError, match=message):
            peftk.PeftModel.from_pretrained(net(), tmp_path / "file")
        with pytest.raises(CheckpointError, match=message):
            turned(tmp_path / "file", tmp_path / "out", "lycoris")


@pytest.mark.parametrize("dialect", ["kohya", "lycoris"])
def test_prefixes_of_the_file_are_kept(dialect: str, tmp_path: Path) -> None:
    for prefixes in (["lora_te1_", "lora_unet_"], ["lora_te_", "lora_unet_"], ["lora_transformer_"]):
        save_file({k: v for one in prefixes for k, v in lora(f"{one}first").items()}, tmp_path / "file")
        found = load_file(turned(tmp_path / "file", tmp_path / f"out{len(prefixes)}{prefixes[0]}", dialect))
        assert {key.partition(".")[0] for key in found} == {f"{one}first" for one in prefixes}


@pytest.mark.parametrize(
    ("others", "prefix"),
    [
        (["unet.mid.0"], "lora_te_"),
        (["transformer.blocks.0"], "lora_te1_"),
        (["unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"], "lora_te1_"),
        (["text_encoder_2.first"], "lora_te1_"),
    ],
)
def test_the_first_of_several_encoders_has_a_number(others: list[str], prefix: str, tmp_path: Path) -> None:
    names = ["text_encoder.first", *others]
    tensors = {k.replace("down", "A").replace("up", "B"): v for name in names for k, v in lora(name).items()}
    save_file(tensors, tmp_path / "file")
    assert f"{prefix}first.alpha" in load_file(turned(tmp_path / "file", tmp_path / "out", "kohya"))


def test_modules_of_two_models_are_not_read_into_one(tmp_path: Path) -> None:
    tensors = lora("unet.first") | lora("transformer.second")
    save_file({k.replace("down", "A").replace("up", "B"): v for k, v in tensors.items()}, tmp_path / "file")
    model = nn.ModuleDict({"first": nn.Linear(16, 12), "second": nn.Linear(16, 12)})
    with pytest.raises(CheckpointError, match=r"'transformer\.' and 'unet\.': modules of several models in this one"):
        peftk.PeftModel.from_pretrained(model, tmp_path / "file")


def test_shapes_that_the_model_contradicts_are_refused(tmp_path: Path) -> None:
    for tensors, weight in [
        (lora("lora_unet_a", 27, 6), (6, 3, 3, 3)),
        (lora("lora_unet_a", 16, 12), (12, 8)),
        ({"lora_unet_a.lokr_w1": torch.ones(2, 2), "lora_unet_a.lokr_w2": torch.ones(3, 4)}, (6, 6)),
    ]:
        save_file(tensors, tmp_path / "file")
        save_file({"a.weight": torch.zeros(weight)}, tmp_path / "model.safetensors")
        with pytest.raises(
            CheckpointError, match=r"module 'lora_unet_a': is for a weight \(.*\), and the model has one"
        ):
            turned(tmp_path / "file", tmp_path / "out", "peft", weights=model_weights(tmp_path / "model.safetensors"))


def test_the_names_of_the_authors_are_written_although_the_source_had_others(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from support.diffusion_models import made

    made("Flux").save_pretrained(tmp_path / "model")
    weights = model_weights(tmp_path / "model")
    save_file(lora("lora_unet_transformer_blocks_0_attn_to_out_0", 32, 32), tmp_path / "file")
    turned(tmp_path / "file", tmp_path / "peft", "peft", weights=weights)
    found = load_file(turned(tmp_path / "peft", tmp_path / "out", "kohya", weights=weights, original=True))
    assert "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight" in found


def test_layers_of_gpt2_have_their_inputs_first(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    def conv1d() -> nn.Module:
        return nn.ModuleDict({"first": Conv1D(12, 16)})

    scale = torch.rand(12, 1)
    save_file(lora("lora_unet_first", dora_scale=scale), tmp_path / "file")
    merged = peftk.PeftModel.from_pretrained(conv1d(), tmp_path / "file").merge_and_unload()["first"].weight
    assert_close(merged.norm(dim=0), scale.flatten().double(), torch.float32)
    four = {
        f"lora_unet_first.hada_w{n}_{ab}": torch.ones((12, 2) if ab == "a" else (2, 16)) for n in "12" for ab in "ab"
    }
    save_file(four, tmp_path / "file")
    with pytest.raises((CheckpointError, TypeError)) as caught:
        peftk.PeftModel.from_pretrained(conv1d(), tmp_path / "file")
    assert str(caught.value).startswith(str(tmp_path / "file")) and "adapter_config.json" not in str(caught.value)


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr"])
def test_accelerated_magnitudes_of_lycoris_compile_in_one_piece(algorithm: str) -> None:
    lycoris = pytest.importorskip("lycoris")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh())
    network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1, algo=algorithm, dora_wd=True)
    network.apply_to()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(5, 16)
    expected = model(x)
    report = peftk.accelerate(network)
    try:
        torch.compiler.reset()
        assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected.double(), torch.float32)
    finally:
        report.restore()
        network.restore()
