"""Adapters merged into the files of a model: bit by bit as merging in memory does, or refused with nothing left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftk
from peftk.checkpoint.container import CheckpointError
from peftk.models.base_files import read_base
from peftk.models.merge_files import merge_files
from peftk.testing.compare import assert_close
from peftk.testing.memory import peak_bytes

transformers = pytest.importorskip("transformers")

TARGETS = ["q_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": peftk.LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS),
    "dora": peftk.LoraConfig(r=2, use_dora=True, target_modules=TARGETS),
    "dora inputs": peftk.LoraConfig(r=2, use_dora=True, dora_inputs=True, target_modules=TARGETS),
    "embedding": peftk.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "classifier": peftk.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "adalora": peftk.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=TARGETS),
    "loha": peftk.LoHaConfig(r=2, target_modules=TARGETS),
    "lokr": peftk.LoKrConfig(r=2, target_modules=TARGETS),
    "oft": peftk.OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "boft": peftk.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=TARGETS),
    "c3a": peftk.C3AConfig(block_size=8, target_modules=TARGETS),
    "output oft": peftk.OutputOFTConfig(block_size=4, use_rescale=True, target_modules=TARGETS),
}


def llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def trained(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model in several files."""
    llama().save_pretrained(tmp_path / "base", max_shard_size="8KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    return tmp_path / "base"


def adapted(config: Any, folder: Path, model: nn.Module | None = None) -> Any:
    model = peftk.get_peft_model(llama() if model is None else model, config)
    trained(model)
    model.eval().save_pretrained(folder)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_are_those_of_a_merged_model(name: str, base: Path, tmp_path: Path) -> None:
    model = adapted(CONFIGS[name], tmp_path / "adapter")
    done = merge_files(read_base(base), [(str(tmp_path / "adapter"), 1.0)], tmp_path / "out")
    expected = model.merge_and_unload().state_dict()
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in base.iterdir()}
    assert len(done.lost) == (3 if name == "embedding" else 4) and all(0 <= lost < 1e-3 for lost in done.lost.values())
    assert done.replaced == (["lm_head.weight"] if name == "classifier" else [])
    changed = [key for key, value in tensors(base).items() if not torch.equal(value, found[key])]
    assert len(changed) == len(done.lost) + len(done.replaced)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.base_model.model(ids).logits)


def test_half_precision_says_what_rounding_takes(tmp_path: Path) -> None:
    llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(CONFIGS["lora"], tmp_path / "adapter", llama(dtype=torch.bfloat16))
    done = merge_files(read_base(tmp_path / "base"), [(str(tmp_path / "adapter"), 1.0)], tmp_path / "out")
    expected = model.merge_and_unload().state_dict()
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(1e-3 < lost < 1 for lost in done.lost.values())
    wide = merge_files(
        read_base(tmp_path / "base"), [(str(tmp_path / "adapter"), 1.0)], tmp_path / "wide", dtype=torch.float32
    )
    assert max(wide.lost.values()) < 1e-3
    assert {value.dtype for value in tensors(tmp_path / "wide").values()} == {torch.float32}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype is torch.float32


def test_memory_is_that_of_one_mapped_file_and_of_the_work_on_one_layer(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).half()
    model.save_pretrained(tmp_path / "base", max_shard_size="8MB")
    sizes = [file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")]
    adapted(peftk.LoraConfig(r=4, target_modules="all-linear"), tmp_path / "adapter", model)
    base, adapters = read_base(tmp_path / "base"), [(str(tmp_path / "adapter"), 1.0)]
    # In float64: the weight, its update, and what it becomes, twice. Beside it, the file that is read is mapped.
    work = 4 * 8 * 512 * 1024
    assert sum(sizes) > max(sizes) + work
    assert peak_bytes(lambda: merge_files(base, adapters, tmp_path / "out"), []) < max(sizes) + work + 2**20


def test_several_adapters_with_weights(base: Path, tmp_path: Path) -> None:
    for name, targets in (("one", ["q_proj"]), ("two", TARGETS)):
        adapted(peftk.LoraConfig(r=2, target_modules=targets), tmp_path / name)
    merge_files(read_base(base), [(str(tmp_path / "one"), 0.5), (str(tmp_path / "two"), -1.0)], tmp_path / "out")
    model = peftk.PeftModel.from_pretrained(llama(), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", "two")
    model.base_model.set_adapter(["one", "two"])
    for layer in model.modules():
        if isinstance(layer, peftk.nn.LoRALinear):
            layer.set_scale("one", 0.5)
            layer.set_scale("two", -1.0)
    expected = model.merge_and_unload().state_dict()
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_files_of_other_programs(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = {"lora_unet_model_layers_0_self_attn_q_proj.lora_down.weight": torch.randn(2, 16)}
    file["lora_unet_model_layers_0_self_attn_q_proj.lora_up.weight"] = torch.randn(16, 2)
    save_file(file, tmp_path / "kohya.safetensors")
    done = merge_files(read_base(base), [(str(tmp_path / "kohya.safetensors"), 1.0)], tmp_path / "out")
    assert list(done.lost) == ["model.layers.0.self_attn.q_proj"]
    key = "model.layers.0.self_attn.q_proj.weight"
    expected = peftk.PeftModel.from_pretrained(llama(), tmp_path / "kohya.safetensors").merge_and_unload()
    assert torch.equal(tensors(tmp_path / "out")[key], expected.state_dict()[key])


def test_a_model_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")

    def autoencoder() -> nn.Module:
        torch.manual_seed(0)
        return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1).eval()

    autoencoder().save_pretrained(tmp_path / "base")
    config = peftk.LoraConfig(r=2, target_modules=["to_q", "conv1"])
    model = adapted(config, tmp_path / "adapter", autoencoder())
    merge_files(read_base(tmp_path / "base"), [(str(tmp_path / "adapter"), 1.0)], tmp_path / "out")
    expected = model.merge_and_unload().state_dict()
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    llama(tied=True).save_pretrained(tmp_path / "tied")
    adapted(CONFIGS["embedding"], tmp_path / "embedding", llama(tied=True))
    adapted(CONFIGS["lora"], tmp_path / "lora")
    other = peftk.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peftk.LoraConfig(r=2, target_modules=["0"]))
    other.save_pretrained(tmp_path / "other")
    prompt = peftk.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    adapted(prompt, tmp_path / "prompt")
    chosen = peftk.XLoraConfig(hidden_size=16, adapters={"0": str(tmp_path / "lora")}, task_type="CAUSAL_LM")
    model = llama()
    model.config.use_cache = False
    peftk.get_peft_model(model, chosen).save_pretrained(tmp_path / "xlora")
    before = sorted(path.name for path in tmp_path.iterdir())
    for folder, adapter, message in [
        ("base", "xlora", "X-LoRA"),
        ("tied", "embedding", "is shared .*; merge it on the model in memory"),
        ("base", "other", "target_modules|no module"),
        ("base", "prompt", "is an adaption prompt, .* which no weight can hold"),
        ("base", "nothing", "expected an existing folder|nothing"),
    ]:
        with pytest.raises((CheckpointError, ValueError), match=message):
            merge_files(read_base(tmp_path / folder), [(str(tmp_path / adapter), 1.0)], tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    source, adapter = read_base(base), [(str(tmp_path / "lora"), 1.0)]
    for read in (base, tmp_path / "lora", tmp_path):
        with pytest.raises(ValueError, match="another folder than those that are read"):
            merge_files(source, adapter, read, force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(ValueError, match="is there already"):
        merge_files(source, adapter, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"
    with pytest.raises(ValueError, match="in a folder that is there"):
        merge_files(source, adapter, tmp_path / "no" / "out")
    with pytest.raises(ValueError, match="it is no model to replace"):
        merge_files(source, adapter, tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"


def test_weights_that_are_not_finite_are_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(CONFIGS["lora"], tmp_path / "adapter")
    path = next(path for path in base.glob("*.safetensors") if any("q_proj" in key for key in load_file(path)))
    values = load_file(path)
    values[next(key for key in values if "q_proj" in key)][0, 0] = torch.inf
    save_file(values, path, {"format": "pt"})
    with pytest.raises(ValueError, match="finite"):
        merge_files(read_base(base), [(str(tmp_path / "adapter"), 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_files(read_base(base), [(str(tmp_path / "adapter"), 1.0)], tmp_path / "out", safe_merge=False)

    def full(stream: IO[bytes], *_: object) -> None:
        stream.write(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peftk.models.merge_files.write_in_turn", full)
    with pytest.raises(OSError, match="No space left"):
        merge_files(read_base(base), [(str(tmp_path / "adapter"), 1.0)], tmp_path / "third", safe_merge=False)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    adapted(CONFIGS["lora"], tmp_path / "small")
    # Finite in the dtype of the work, and not in that of the file.
    file = tmp_path / "small" / "adapter_model.safetensors"
    large = {key: value * (1e7 if "lora_A" in key else 1) for key, value in load_file(file).items()}
    llama(dtype=torch.float16).save_pretrained(tmp_path / "half")
    save_file(large, file)
    with pytest.raises(ValueError, match=r"safe_merge: .* non-finite"):
        merge_files(read_base(tmp_path / "half"), [(str(tmp_path / "small"), 1.0)], tmp_path / "out")
    # Weights that no adapter touches.
    adapted(CONFIGS["lora"], tmp_path / "adapter")
    model = llama()
    model.model.norm.weight.data *= 1e6
    model.save_pretrained(tmp_path / "wide")
    base, adapters = read_base(tmp_path / "wide"), [(str(tmp_path / "adapter"), 1.0)]
    with pytest.raises(ValueError, match=r"dtype: key 'model\.norm\.weight' has numbers that are infinite in"):
        merge_files(base, adapters, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    merge_files(base, adapters, tmp_path / "out", dtype=torch.float16, safe_merge=False)
    assert tensors(tmp_path / "out")["model.norm.weight"].isinf().all()


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_factors_that_are_a_part_of_the_weight_are_refused(how: str, base: Path, tmp_path: Path) -> None:
    adapted(peftk.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=how), tmp_path / "adapter")
    adapted(CONFIGS["lora"], tmp_path / "lora")
    for adapters in (["adapter"], ["lora", "adapter"]):
        with pytest.raises(CheckpointError, match=f"init_lora_weights='{how}': .* merge it on the model in memory"):
            merge_files(read_base(base), [(str(tmp_path / one), 1.0) for one in adapters], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shared_weights_are_not_replaced_in_one_place_alone(tmp_path: Path) -> None:
    llama(tied=True).save_pretrained(tmp_path / "tied")
    saved = peftk.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["embed_tokens"])
    adapted(saved, tmp_path / "adapter", llama(tied=True))
    with pytest.raises(CheckpointError, match=r"was shared \(.*lm_head\.weight\); merge it on the model in memory"):
        merge_files(read_base(tmp_path / "tied"), [(str(tmp_path / "adapter"), 1.0)], tmp_path / "out")


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    adapted(CONFIGS["lora"], tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    packed = {k: v.to(torch.float8_e4m3fn) if "q_proj" in k else v for k, v in load_file(file).items()}
    save_file(packed, file, {"format": "pt"})
    for dtype, message in ((None, "merge it on the model in memory, dequantised"), (torch.bfloat16, "dtype has to be")):
        with pytest.raises(CheckpointError, match=message):
            merge_files(read_base(tmp_path / "base"), [(str(tmp_path / "adapter"), 1.0)], tmp_path / "out", dtype=dtype)


def test_embeddings_that_come_with_the_adapter(tmp_path: Path) -> None:
    """PEFT saves the weights of embeddings that are adapted beside their factors."""
    peft = pytest.importorskip("peft")
    llama().save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"]))
    trained(model)
    model.base_model.model.model.embed_tokens.base_layer.weight.data[3] += 1
    model.save_pretrained(tmp_path / "adapter")
    assert any(
        "embed_tokens" in key and "lora" not in key
        for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    )
    merge_files(read_base(tmp_path / "base"), [(str(tmp_path / "adapter"), 1.0)], tmp_path / "out")
    model.merge_and_unload().save_pretrained(tmp_path / "expected")
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value.double(), torch.float32, what=key)


def test_what_lies_in_subfolders_is_copied_and_a_link_stays_one(base: Path, tmp_path: Path) -> None:
    adapted(CONFIGS["lora"], tmp_path / "adapter")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_text("weights")
    adapters = [(str(tmp_path / "adapter"), 1.0)]
    merge_files(read_base(base), adapters, tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "{{ x }}"
    assert not (tmp_path / "out" / "onnx").exists()
    (tmp_path / "link").symlink_to("out")
    merge_files(read_base(base), adapters, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "out" / "config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out", "link"}


def test_adapters_with_a_sign_of_equality_in_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftk.commands.merge import _with_weight

    monkeypatch.chdir(tmp_path)
    assert _with_weight("some/repository") == ("some/repository", 1.0)
    assert _with_weight("lr=0.5") == ("lr", 0.5)
    (tmp_path / "lr=0.5").mkdir()
    assert _with_weight("lr=0.5") == ("lr=0.5", 1.0) and _with_weight("lr=0.5=2") == ("lr=0.5", 2.0)
    (tmp_path / "lr").mkdir()
    with pytest.raises(ValueError, match=r"also: 'lr=0.5' and 'lr' are both there"):
        _with_weight("lr=0.5")
    with pytest.raises(ValueError, match="also: expected ADAPTER or ADAPTER=WEIGHT with a number, got 'a=b'"):
        _with_weight("a=b")


def test_damaged_bases_are_named(base: Path, tmp_path: Path) -> None:
    index = base / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for change, message in [
        ({"weight_map": 3}, "weight_map: expected"),
        ({"weight_map": {**good["weight_map"], "x": "../x.safetensors"}}, "in this folder"),
        ({"weight_map": {**good["weight_map"], "x": "gone.safetensors"}}, "gone.safetensors: missing"),
        ({"weight_map": {**good["weight_map"], "x": min(good["weight_map"].values())}}, "key 'x': not in"),
    ]:
        index.write_text(json.dumps(change))
        with pytest.raises(CheckpointError, match=message):
            read_base(base)
    index.write_text(json.dumps(good))
    (base / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    with pytest.raises(CheckpointError, match="expected a model of transformers, got 'NoSuchModel'"):
        merge_files(read_base(base), [("adapter", 1.0)], tmp_path / "out")
    # A function of transformers, and one of its classes that is no model.
    for name in ("pipeline", "Trainer"):
        (base / "config.json").write_text(json.dumps({"architectures": [name]}))
        with pytest.raises(CheckpointError, match="it is no PreTrainedModel"):
            merge_files(read_base(base), [("adapter", 1.0)], tmp_path / "out")
    (base / "config.json").unlink()
    with pytest.raises(CheckpointError, match="expected the configuration of a model"):
        read_base(base)
    with pytest.raises(CheckpointError, match="expected a folder"):
        read_base(tmp_path / "gone")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_model_that_is_replaced_is_never_lost(
    failing: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(CONFIGS["lora"], tmp_path / "adapter")
    source, adapter, out = read_base(base), [(str(tmp_path / "adapter"), 1.0)], tmp_path / "out"
    merge_files(source, adapter, out)
    before = tensors(out)
    replace, calls = os.replace, iter(range(9))

    def interrupted(old: Any, new: Any) -> None:
        if next(calls) == failing:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr("peftk.models.merge_files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_files(source, [(adapter[0][0], 0.5)], out, force=True)
    monkeypatch.undo()
    assert all(torch.equal(value, before[key]) for key, value in tensors(out).items())
    merge_files(source, [(adapter[0][0], 0.5)], out, force=True)
    assert not all(torch.equal(value, before[key]) for key, value in tensors(out).items())
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}
