"""``python -m peftk convert``: the plan, what it says at the end, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from peftk.commands import convert

app = typer.Typer()
app.command()(convert.convert)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {
        "lora_unet_mid_attn.lora_down.weight": torch.randn(2, 6),
        "lora_unet_mid_attn.lora_up.weight": torch.randn(4, 2),
        "lora_unet_mid_attn.alpha": torch.tensor(3.0, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    save_file({"mid.attn.weight": torch.zeros(4, 6), "mid.attn.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    return tmp_path / "in.safetensors"


def test_the_plan_is_printed_and_the_way_back_is_exact(file: Path) -> None:
    out, back = file.with_name("out.safetensors"), file.with_name("back.safetensors")
    done = run(file, out, "--to", "diffusers", "--model", file.with_name("model.safetensors"))
    assert done.exit_code == 0, done.output
    assert "kohya, LoRA on 1 modules; written as diffusers" in done.output
    assert "unet.mid.attn.lora_A.weight" in done.output and "in the configuration" in done.output
    assert "the updates of all 1 modules, in float64, are the same bit by bit" in done.output
    done = run(out, back, "--to", "kohya", "--json")
    report = json.loads(done.output)
    assert report["exact"] and report["compared"] == {"unet.mid.attn": 0.0}
    before, after = load_file(file), load_file(back)
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)


def test_a_dry_run_writes_nothing(file: Path) -> None:
    done = run(file, file.with_name("out"), "--to", "lycoris", "--dry-run")
    assert done.exit_code == 0 and "written as LyCORIS" in done.output and "written;" not in done.output
    assert not file.with_name("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "webui"), "dialect: expected one of peft, kohya"),
        (("--to", "diffusers"), "pass --model"),
        (("--to", "kohya", "--model", "nowhere.safetensors"), "cannot be opened"),
        (("--to", "kohya", "--component", "vae"), "component: expected one of unet"),
        (("--to", "kohya", "--drop", "*"), "nothing is left to be written"),
    ],
)
def test_what_is_wrong_is_said(arguments: tuple[str, ...], message: str, file: Path) -> None:
    done = run(file, file.with_name("out"), *arguments)
    assert done.exit_code == 1 and message in done.output, done.output
    assert not file.with_name("out").exists()
