"""Adapters in folders and repositories: the arguments of loading, the cache of the hub, pushing, base models."""

from __future__ import annotations

import json

import pytest
import torch
from support.beside_peft import theirs_of, trained
from support.toy_model import X, lora, toy

import peftk
from peftk.nn import PeftConfig


def test_a_repository_is_read_from_the_cache_of_the_hub(tmp_path, monkeypatch) -> None:
    model = trained(peftk.get_peft_model(toy(), lora()))
    revision = "a" * 40
    cached = tmp_path / "models--someone--adapter"
    model.save_pretrained(cached / "snapshots" / revision)
    model.save_pretrained(cached / "snapshots" / revision / "inner")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    options = {"cache_dir": str(tmp_path), "local_files_only": True}
    loaded = peftk.PeftModel.from_pretrained(toy(), "someone/adapter", **options)
    assert torch.equal(loaded(X), model(X))
    inner = peftk.PeftModel.from_pretrained(toy(), "someone/adapter", subfolder="inner", **options)
    assert torch.equal(inner(X), model(X))
    assert loaded.load_adapter("someone/adapter", "again", **options) == ([], [])
    assert PeftConfig.from_pretrained("someone/adapter", **options).r == 2
    for name in ("someone/other", "no such folder, and no name"):
        with pytest.raises(ValueError, match="model_id: expected the folder of a saved adapter, or the name"):
            peftk.PeftModel.from_pretrained(toy(), name, **options)


def test_pushing_uploads_the_saved_folder(monkeypatch) -> None:
    import huggingface_hub

    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            seen["private"] = private
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id, folder_path, **options):
            from pathlib import Path

            seen["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            seen["options"] = options
            return type("Commit", (), {"commit_url": f"address of {repo_id}"})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    base = toy()
    base.config = object()
    model = peftk.get_peft_model(base, lora(base_model_name_or_path="someone/model"))
    assert model.push_to_hub("me/adapter", private=True, token="t") == "address of me/adapter"
    assert seen["files"].keys() >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = seen["files"]["README.md"].decode()
    assert "base_model: someone/model" in card and "library_name: peft" in card and "- lora" in card
    assert json.loads(seen["files"]["adapter_config.json"])["peft_type"] == "LORA"
    assert (seen["token"], seen["private"], seen["options"]["create_pr"]) == ("t", True, False)


def test_a_model_card_that_is_there_stays(tmp_path) -> None:
    (tmp_path / "README.md").write_text("mine")
    peftk.get_peft_model(toy(), lora()).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("ephemeral_gpu_offload", True, NotImplementedError),
        ("use_safetensors", False, NotImplementedError),
        ("ignore_mismatched_sizes", True, NotImplementedError),
        ("device_map", "auto", NotImplementedError),
        ("torch_dtype", torch.bfloat16, NotImplementedError),
        ("odd", 1, TypeError),
    ],
)
def test_arguments_whose_feature_is_not_here_are_refused_by_name(tmp_path, name, value, error) -> None:
    model = peftk.get_peft_model(toy(), lora())
    model.save_pretrained(tmp_path)
    with pytest.raises(error, match=name):
        peftk.PeftModel.from_pretrained(toy(), tmp_path, **{name: value})
    with pytest.raises(error, match=name):
        model.load_adapter(tmp_path, "other", **{name: value})
    assert model.load_adapter(tmp_path, "other", torch_device="cpu", use_safetensors=True) == ([], [])


def test_a_given_configuration_takes_the_place_of_the_file(tmp_path) -> None:
    model = trained(peftk.get_peft_model(toy(), lora(lora_alpha=8)))
    model.save_pretrained(tmp_path)
    loaded = peftk.PeftModel.from_pretrained(toy(), tmp_path, config=lora(lora_alpha=16))
    assert {layer.scaling["default"] for _, layer in loaded.base_model._layers()} == {8.0}
    (tmp_path / "adapter_config.json").unlink()
    again = peftk.PeftModel.from_pretrained(toy(), tmp_path, config=theirs_of(lora(lora_alpha=8)))
    assert torch.equal(again(X), model(X))


def test_a_base_model_and_its_adapter_in_one_call(tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    for task in ("CAUSAL_LM", None):
        model = trained(peftk.get_peft_model(base, lora(target_modules=["q_proj"], task_type=task)))
        model.save_pretrained(tmp_path / "adapter")
        ids = torch.arange(6)[None]
        expected = model(input_ids=ids).logits
        for cls in (peftk.AutoPeftModelForCausalLM, *([] if task else [peftk.AutoPeftModel])):
            loaded = cls.from_pretrained(tmp_path / "adapter")
            assert isinstance(loaded, peftk.PeftModel) and torch.allclose(loaded(input_ids=ids).logits, expected)
        base = model.unload()
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    evil = PeftConfig.from_dict(values | {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}})
    with pytest.raises(ValueError, match=r"auto_mapping: the configuration names os\.system"):
        peftk.AutoPeftModel.from_pretrained(tmp_path / "adapter", config=evil)
    with pytest.raises(OSError, match="from_pretrained"):
        peftk.AutoPeftModel()
