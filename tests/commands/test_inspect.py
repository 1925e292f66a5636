"""``python -m peftk inspect``: what it says of files of every dialect, as a table and as JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

import peftk
from peftk.checkpoint.adapted import TYPES
from peftk.checkpoint.recognise import recognise
from peftk.commands import inspect

app = typer.Typer()
app.command()(inspect.inspect)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def lora(prefix: str, down: str, up: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{down}": torch.full((2, 6), 2.0), f"{prefix}.{up}": torch.zeros(4, 2)}


KOHYA = lora("lora_unet_mid_attn", "lora_down.weight", "lora_up.weight") | {
    "lora_unet_mid_attn.alpha": torch.tensor(3.0)
}
FILES = {
    "kohya": KOHYA,
    "LyCORIS": KOHYA | {"lora_unet_out.hada_w1_a": torch.ones(4, 2), "lora_unet_out.hada_w1_b": torch.ones(2, 6)},
    "diffusers": lora("unet.mid.attn", "lora_A.weight", "lora_B.weight"),
    "ComfyUI": lora("diffusion_model.mid.attn", "lora_A.weight", "lora_B.weight"),
    "PEFT": lora("base_model.model.mid.attn", "lora_A.weight", "lora_B.weight"),
    "bare names": lora("mid.attn", "lora_A.weight", "lora_B.weight"),
    "several": KOHYA | lora("unet.mid.attn", "lora_A.weight", "lora_B.weight"),
}


@pytest.mark.parametrize("dialect", FILES)
def test_a_file_is_named(dialect: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({key: value.clone() for key, value in FILES[dialect].items()}, path, {"ss_base_model": "x"})
    report = json.loads(run(str(path), "--json"))
    assert report["dialect"] == dialect
    assert report["certain"] == (dialect not in ("several", "LyCORIS")) == (not report["problems"])
    assert report["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    first = report["modules"][0]
    assert (first["method"], first["rank"], first["dtypes"]) == ("LoRA", 2, ["float32"])
    assert first["norm"] == pytest.approx(48**0.5)
    if dialect == "kohya":
        assert first["alpha"] == 3
    if dialect == "LyCORIS":
        assert "hada_w2_a, hada_w2_b missing" in report["problems"][0]
    table = run(str(path))
    assert dialect in table and "ss_base_model" in table and report["sha256"] in table.replace("\n", "")
    assert max(map(len, table.splitlines())) <= 120


def test_a_folder_of_peft(tmp_path: Path) -> None:
    model = peftk.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), peftk.LoHaConfig(r=3, target_modules="0"))
    model.save_pretrained(tmp_path)
    report = json.loads(run(str(tmp_path), "--json"))
    assert (report["dialect"], report["certain"], report["methods"]) == ("PEFT", True, ["LoHa"])
    assert [(m["module"], m["rank"], m["alpha"]) for m in report["modules"]] == [("base_model.model.0", 3, 8)]
    assert report["digests"] == "agree"


@pytest.mark.parametrize("method", peftk.PeftConfig._by_type)
def test_the_files_of_every_method_are_known(method: str) -> None:
    from support.layer_cases import CASES, make

    cases = [case for case in CASES.values() if case.config._method == method]
    for case in cases:
        layer = make(case)
        adapter = layer.adapter("default")
        shapes = {f"base_model.model.x.{key}": tensor.shape for key, tensor in adapter.saved_tensors()}
        found = recognise(shapes)
        assert found.certain and found.dialect == "PEFT", (case, found.problems(), shapes)
        assert [TYPES.get(name, name.upper()) for name in found.methods] == [method]


def test_what_is_no_adapter_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"model.weight": torch.ones(2, 2)}, path)
    assert "no adapter" in run(str(path))
    for wrong in (tmp_path / "nothing.safetensors", tmp_path / "file.pt"):
        done = CliRunner().invoke(app, [str(wrong)])
        assert done.exit_code == 1 and str(wrong) in done.output.replace("\n", "")
    path.write_bytes(b"\x80\x04pickle")
    done = CliRunner().invoke(app, [str(path)])
    assert done.exit_code == 1 and "pickle" in done.output
