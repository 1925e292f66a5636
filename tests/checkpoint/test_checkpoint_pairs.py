"""The two files of an adapter belong together: edits, lost fields and saves in between are noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import CONFIG, WEIGHTS, adapter, same, shapes_of
from support.parity_cases import TOKENS
from support.toy_model import X, assert_unchanged, lora, snapshot, toy
from support.xlora_models import llama

from peftk import LoraConfig, XLoraConfig
from peftk.checkpoint import CheckpointError, read_adapter, read_config, read_safetensors, write_adapter, writer
from peftk.checkpoint import peft as files
from peftk.models.peft_model import PeftModel, get_peft_model

VALUES = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ("fc",), "rank_pattern": {"a": 1, "b": 2}}


def change(folder: Path, edit) -> None:
    values = json.loads((folder / CONFIG).read_text())
    edit(values)
    (folder / CONFIG).write_text(json.dumps(values))


def strip(folder: Path) -> None:
    """Write the tensors anew, as another library would."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt"})


def as_early_peftk(folder: Path) -> None:
    with open(folder / "early", "wb") as stream:
        writer.write_safetensors(stream, load_file(folder / WEIGHTS), {"format": "pt"})
    os.replace(folder / "early", folder / WEIGHTS)


def read(folder: Path):
    return read_adapter(folder, shapes_of(adapter()), None, read_config(folder))


# Edits

REFUSED = {
    "value": lambda c: c.update(lora_alpha=9),
    "lost field": lambda c: c.pop("lora_alpha"),
    "new field": lambda c: c.update(use_rslora=True),
    "order of patterns": lambda c: c.update(rank_pattern={"b": 2, "a": 1}),
    "empty": lambda c: c.clear(),
}
ALLOWED = {
    "layout": lambda c: None,
    "order of fields": lambda c: [c.update({name: c.pop(name)}) for name in list(c)[:2]],
    "base model": lambda c: c.update(base_model_name_or_path="elsewhere"),
    "revision": lambda c: c.update(revision="main"),
    "mode": lambda c: c.update(inference_mode=False),
}


@pytest.mark.parametrize("edit", REFUSED)
def test_an_edited_configuration_is_refused(tmp_path: Path, edit: str) -> None:
    write_adapter(tmp_path, adapter(), VALUES)
    assert same(read(tmp_path), adapter())
    change(tmp_path, REFUSED[edit])
    with pytest.raises(CheckpointError, match=r"sha256 expected '[0-9a-f]{64}'.*Put the saved file back") as caught:
        read(tmp_path)
    assert caught.value.file == str(tmp_path / CONFIG)


@pytest.mark.parametrize("edit", ALLOWED)
def test_what_says_nothing_about_the_adapter_may_be_edited(tmp_path: Path, edit: str) -> None:
    write_adapter(tmp_path, adapter(), VALUES)
    change(tmp_path, ALLOWED[edit])
    assert same(read(tmp_path), adapter())


def test_the_way_out_of_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path, adapter(), VALUES)
    change(tmp_path, REFUSED["value"])
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = caught.value.problems[0].split("without the metadata: ")[1]
    import safetensors.torch

    exec(command, {"safetensors": safetensors})
    assert same(read(tmp_path), adapter())


@pytest.mark.parametrize("write", [strip, as_early_peftk])
def test_files_without_the_digest_load(tmp_path: Path, write, caplog: pytest.LogCaptureFixture) -> None:
    write_adapter(tmp_path, adapter(), VALUES)
    write(tmp_path)
    change(tmp_path, REFUSED["value"])
    with caplog.at_level("INFO"):
        assert same(read(tmp_path), adapter())
    assert "unverified" in caplog.text


def test_the_digest_cannot_be_taken_out_alone(tmp_path: Path) -> None:
    write_adapter(tmp_path, adapter(), VALUES)
    raw = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(raw.replace(b"peftk_config_sha256", b"peftk_config_sha257"))
    with pytest.raises(CheckpointError, match="metadata: sha256"):
        read_safetensors(tmp_path / WEIGHTS)


# Models


EDITS = {"lora_alpha": 9, "use_rslora": True, "bias": "all"}


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("field", EDITS)
def test_every_adapter_of_a_model_is_covered_and_a_refusal_changes_nothing(tmp_path: Path, name: str, field) -> None:
    model = get_peft_model(toy(), lora(modules_to_save=["classifier"]))
    model.add_adapter("other", lora())
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    change(folder, lambda values: values.update({field: EDITS[field]}))
    base = toy()
    before = snapshot(base)
    with pytest.raises(CheckpointError, match="sha256 expected"):
        PeftModel.from_pretrained(base, folder)
    assert_unchanged(base, before)


def test_peft_reads_both_files(tmp_path: Path) -> None:
    model = get_peft_model(toy(), lora()).eval()
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(toy(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(X), model(X))
    # What PEFT saves over it has no digest, and is not held against the old one.
    theirs.save_pretrained(str(tmp_path))
    torch.testing.assert_close(PeftModel.from_pretrained(toy(), tmp_path)(X), model(X))


def test_files_of_x_lora(tmp_path: Path) -> None:
    experts = {}
    for index in range(2):
        experts[str(index)] = str(tmp_path / f"expert{index}")
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(llama(), config).save_pretrained(experts[str(index)])
    config = XLoraConfig(hidden_size=16, adapters=experts, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config).eval()
    model.save_pretrained(tmp_path / "x")
    y = model(input_ids=TOKENS).logits
    change(tmp_path / "x", lambda values: values.update(adapters={"0": "moved/0", "1": "moved/1"}))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "x", adapters=experts)
    assert torch.equal(loaded(input_ids=TOKENS).logits, y)
    change(tmp_path / "x", lambda values: values.update(softmax_temperature=2.0))
    with pytest.raises(CheckpointError, match="sha256 expected"):
        PeftModel.from_pretrained(llama(), tmp_path / "x", adapters=experts)
    change(tmp_path / "x", lambda values: values.update(softmax_temperature=1.0))
    change(tmp_path / "expert1", lambda values: values.update(lora_alpha=99))
    with pytest.raises(CheckpointError, match=r"expert1.*sha256 expected"):
        PeftModel.from_pretrained(llama(), tmp_path / "x", adapters=experts)


# Saves in between


@pytest.mark.parametrize("write", [lambda folder: None, strip, as_early_peftk])
def test_a_save_between_the_two_reads(tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (get_peft_model(toy(), lora(lora_alpha=alpha)) for alpha in (4, 64))
    old.save_pretrained(tmp_path)
    plain = files.read_adapter

    def late(*args):
        new.save_pretrained(tmp_path)
        write(tmp_path)
        return plain(*args)

    base = toy()
    before = snapshot(base)
    with monkeypatch.context() as patch:
        patch.setattr(files, "read_adapter", late)
        with pytest.raises(CheckpointError, match=r"another save to this folder came between.*load again"):
            PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(X), new.eval()(X))


def test_a_folder_put_together_from_two_saves(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", adapter(0), VALUES)
    write_adapter(tmp_path / "b", adapter(1), VALUES | {"lora_alpha": 16})
    os.replace(tmp_path / "b" / WEIGHTS, tmp_path / "a" / WEIGHTS)
    with pytest.raises(CheckpointError, match="is of another save"):
        read(tmp_path / "a")


# Tensors that change while they are saved


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_every_value_is_read_once(tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = adapter()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    steps = (("nonfinite", writer.nonfinite), ("digest", writer.digest))
    for name, plain in steps:

        def training(tensor, plain=plain):
            for live in tensors.values():
                live.fill_(value)
            return plain(tensor)

        for live, saved in zip(tensors.values(), before.values(), strict=True):
            live.copy_(saved)
        # One tensor: the others are copied after the first check, with whatever they hold by then.
        first = next(iter(tensors))
        with monkeypatch.context() as patch:
            patch.setattr(writer, name, training)
            write_adapter(tmp_path, {first: tensors[first]}, {})
        assert same(read_adapter(tmp_path, {first: before[first].shape}), {first: before[first]})


def test_snapshots_share_no_memory_with_what_they_copy() -> None:
    source = torch.randn(4, 6)
    tensors = {"plain": source, "transposed": torch.randn(3, 2).t(), "expanded": torch.randn(1, 2).expand(3, 2)}
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    copies = writer.snapshot(tensors)
    source.zero_()
    for name, copy in copies.items():
        assert copy.is_contiguous() and torch.equal(copy, wanted[name])
        assert copy.untyped_storage().data_ptr() != tensors[name].untyped_storage().data_ptr()
