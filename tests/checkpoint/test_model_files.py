"""PeftModel saved and loaded, and failed loads that change nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.toy_model import X, assert_unchanged, lora, oft, snapshot, toy, trainable

from peftk.models.peft_model import PeftModel, get_peft_model


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, sorted(tensors)[-1])
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def flip(folder):
    path = folder / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(bytes(raw))


def to_pickle(folder):
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


DAMAGE = {
    "truncated": truncate,
    "tampered": flip,
    "pickle": to_pickle,
    "no file": lambda f: (f / "adapter_model.safetensors").unlink(),
    "no config": lambda f: (f / "adapter_config.json").unlink(),
    "missing key": lambda f: edit_tensors(f, lambda t, k: t.pop(k)),
    "extra key": lambda f: edit_tensors(f, lambda t, k: t.update({k + ".x": torch.ones(1)})),
    "renamed key": lambda f: edit_tensors(f, lambda t, k: t.update({k.replace("query", "qurey"): t.pop(k)})),
    "transposed": lambda f: edit_tensors(f, lambda t, k: t.update({k: t[k].T.contiguous()})),
    "one row": lambda f: edit_tensors(f, lambda t, k: t.update({k: t[k][:1].contiguous()})),
    "NaN": lambda f: edit_tensors(f, lambda t, k: t[k].view(-1)[:1].fill_(float("nan"))),
    "integers": lambda f: edit_tensors(f, lambda t, k: t.update({k: t[k].int()})),
    "other rank": lambda f: edit_config(f, r=3),
    "NaN alpha": lambda f: (f / "adapter_config.json").write_text(
        (f / "adapter_config.json").read_text().replace('"lora_alpha": 8', '"lora_alpha": NaN')
    ),
    "huge alpha": lambda f: edit_config(f, lora_alpha=1e300),
    "true alpha": lambda f: edit_config(f, lora_alpha=True),
    "DoRA": lambda f: edit_config(f, use_dora=True),
    "other targets": lambda f: edit_config(f, target_modules=["value"]),
    "no targets": lambda f: edit_config(f, target_modules=["nowhere"]),
    "unknown method": lambda f: edit_config(f, peft_type="MAGIC"),
    "not an object": lambda f: (f / "adapter_config.json").write_text("[]"),
    "code": lambda f: edit_config(f, megatron_core="os"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_failed_load_changes_nothing(damage, tmp_path):
    source = get_peft_model(toy(), lora(modules_to_save=["classifier"]))
    source.save_pretrained(tmp_path)
    DAMAGE[damage](tmp_path)
    base = toy()
    before = snapshot(base)
    with pytest.raises((ValueError, TypeError, NotImplementedError)):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    model = get_peft_model(toy(), lora(modules_to_save=["classifier"]))
    for name in ("new", "default"):
        before = snapshot(model)
        with pytest.raises((ValueError, TypeError, NotImplementedError)):
            model.load_adapter(tmp_path, name)
        assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]


def test_saving_and_loading(tmp_path):
    model = get_peft_model(toy(), lora(modules_to_save=["classifier"], bias="all"), "main")
    torch.manual_seed(1)
    model.add_adapter("default", oft(target_modules=["value"]))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json", "main"}
    assert json.loads((tmp_path / "main" / "adapter_config.json").read_text())["inference_mode"] is True
    y = model(X)
    loaded = PeftModel.from_pretrained(toy(), tmp_path / "main", "other_name", is_trainable=True)
    assert torch.equal(loaded(X), y)
    assert loaded.training
    # Only in `model` are the value layers wrapped, by the other adapter.
    names = {n.replace(".main.", ".other_name.").replace("value.base_layer", "value") for n in trainable(model)}
    assert trainable(loaded) == names
    loaded.load_adapter(tmp_path, "more", is_trainable=True)
    assert torch.equal(loaded(X), y)
    loaded.set_adapter("more")
    model.set_adapter("default")
    assert torch.equal(loaded(X), model(X))
    model.save_pretrained(tmp_path / "one", selected_adapters=["main"])
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"main", "README.md"}


def test_loading_over_an_adapter(tmp_path):
    model = get_peft_model(toy(), lora())
    model.save_pretrained(tmp_path)
    y = model(X)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(2)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(model(X), y)
    edit_config(tmp_path, lora_alpha=16)
    with pytest.raises(ValueError, match="lora_alpha: the file has 16, the adapter in memory 8"):
        model.load_adapter(tmp_path, "default")
    edit_config(tmp_path, lora_alpha=8)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.load_adapter(tmp_path, "default")


def test_a_file_may_name_modules_that_only_other_models_have(tmp_path):
    model = get_peft_model(toy(), lora())
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, target_modules=["query", "k_proj"])
    # As a file of another library, which has no digest of its configuration.
    edit_tensors(tmp_path, lambda tensors, key: None)
    assert torch.equal(PeftModel.from_pretrained(toy(), tmp_path)(X), model(X))
