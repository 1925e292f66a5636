"""Files whose keys are those of the model but for a rename: the message says which, and `key_mapping` loads them."""

from __future__ import annotations

import json
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftk import LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from peftk.checkpoint import CheckpointError
from peftk.checkpoint.key_mapping import find_mapping, renamer

PREFIX = "base_model.model."
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        return sum(child(x) for child in self.children())


class Model(nn.Module):
    """Two blocks under the given path, each with attention of the given names."""

    def __init__(self, path="model.layers", names=("q_proj", "v_proj")):
        super().__init__()
        torch.manual_seed(0)
        blocks = nn.ModuleList(nn.ModuleDict({"attention": Attention(names)}) for _ in range(2))
        self.blocks = [blocks]
        for part in reversed(path.split(".")[1:]):
            outer = nn.Module()
            outer.add_module(part, blocks)
            blocks = outer
        self.add_module(path.split(".")[0], blocks)

    def forward(self, x):
        for block in self.blocks[0]:
            x = x + block["attention"](x)
        return x


CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=r".*(q_proj|query|v_proj|value)", init_lora_weights=False),
    "loha": LoHaConfig(r=2, target_modules=r".*(q_proj|query|v_proj|value)", init_weights=False),
    "oft": OFTConfig(oft_block_size=4, target_modules=r".*(q_proj|query|v_proj|value)", init_weights=False),
}
# What the file was saved from, and what in the message says how the model that it is loaded on differs.
SOURCES = {
    "prefix more": ({"path": "module.model.layers"}, "the prefix 'module.', which the model's names lack", None),
    "prefix less": ({"path": "layers"}, "the prefix 'model.', which they lack", None),
    "prefix other": (
        {"path": "transformer.h.layers"},
        "the prefix 'transformer.h.' where the model's names have",
        None,
    ),
    "one rename": ({"names": ("query", "v_proj")}, "one rename, 'query' to 'q_proj'", 4),
    "two renames": ({"names": ("query", "value")}, "2 renames", None),
}


def saved(folder, method, source):
    model = get_peft_model(Model(**source), CONFIGS[method]).eval()
    model.save_pretrained(folder)
    return model(X)


def message(folder, **options):
    model = Model()
    before = dict(model.named_modules())
    with pytest.raises(CheckpointError) as caught:
        PeftModel.from_pretrained(model, folder, **options)
    assert dict(model.named_modules()) == before
    return str(caught.value)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("case", SOURCES)
def test_the_first_line_says_the_rename_and_the_mapping_that_would_do(tmp_path, method, case):
    source, words, changed = SOURCES[case]
    expected = saved(tmp_path, method, source)
    said = message(tmp_path)
    first, *rest = said.splitlines()
    assert not rest and words in first and first.startswith(str(tmp_path / "adapter_model.safetensors"))
    count = len(load_file(tmp_path / "adapter_model.safetensors"))
    assert (f"all {count} keys" if changed is None else f"{count // 2} of {count} keys") in first
    mapping = eval(re.search(r"key_mapping=(\{.*\}) to from_pretrained", first)[1])
    loaded = PeftModel.from_pretrained(Model(), tmp_path, key_mapping=mapping)
    torch.testing.assert_close(loaded(X), expected)
    again = get_peft_model(Model(), CONFIGS[method])
    again.load_adapter(tmp_path, "second", key_mapping=mapping)
    again.set_adapter("second")
    torch.testing.assert_close(again.eval()(X), expected)
    # PEFT understands the same mapping.
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path, key_mapping=mapping)
    torch.testing.assert_close(theirs(X), expected)


def test_keys_without_the_prefix_of_peft_get_it(tmp_path):
    expected = saved(tmp_path, "lora", {})
    file = tmp_path / "adapter_model.safetensors"
    save_file({key.removeprefix(PREFIX): tensor for key, tensor in load_file(file).items()}, file)
    said = message(tmp_path)
    assert "by the prefix 'base_model.model.', which they lack" in said and "key_mapping={'^': ''}" in said
    torch.testing.assert_close(PeftModel.from_pretrained(Model(), tmp_path, key_mapping={"^": ""})(X), expected)


def test_a_mapping_of_the_model_is_used_where_the_keys_need_it(tmp_path):
    class Renamed(Model):
        _checkpoint_conversion_mapping = {"^old\\.": "model.", "^model": "nowhere"}  # noqa: RUF012

    expected = saved(tmp_path / "old", "lora", {"path": "old.layers"})
    torch.testing.assert_close(PeftModel.from_pretrained(Renamed(), tmp_path / "old")(X), expected)
    # It would spoil keys that fit as they are.
    expected = saved(tmp_path / "new", "lora", {})
    torch.testing.assert_close(PeftModel.from_pretrained(Renamed(), tmp_path / "new")(X), expected)


def test_mappings_that_cannot_be(tmp_path):
    saved(tmp_path, "lora", {})
    with pytest.raises(TypeError, match="key_mapping: expected a dict"):
        PeftModel.from_pretrained(Model(), tmp_path, key_mapping="module.")
    with pytest.raises(TypeError, match="key_mapping: expected strings"):
        PeftModel.from_pretrained(Model(), tmp_path, key_mapping={"a": None})
    with pytest.raises(ValueError, match=r"key_mapping: expected a regular expression .* '\(a'"):
        PeftModel.from_pretrained(Model(), tmp_path, key_mapping={"(a": "b"})
    with pytest.raises(ValueError, match="key_mapping: expected a regular expression and its replacement"):
        PeftModel.from_pretrained(Model(), tmp_path, key_mapping={"(a)": r"\2"})
    assert "become one" in message(tmp_path, key_mapping={r"\.[01]\.": ".0."})


def test_a_rename_that_explains_only_a_part_is_not_proposed(tmp_path):
    saved(tmp_path, "lora", {"path": "module.model.layers"})
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)
    said = message(tmp_path)
    assert "several problems" in said and "key_mapping" not in said


def test_the_search_is_quick_and_gives_up():
    keys = [f"{PREFIX}model.layers.{i}.{n}.lora_{c}.weight" for i in range(300) for n in "qkvo" for c in "AB"]
    mapping = find_mapping([key.replace("model.layers", "a.b.c") for key in keys], keys)
    assert mapping == {r"^a\.b\.c\.": "model.layers."}
    strangers = [f"{PREFIX}x{i}.lora_{c}.weight" for i in range(1200) for c in "AB"]
    assert find_mapping(strangers, keys) is None
    assert [renamer(mapping)(key) for key in ("base_model.a.b.c.w", "d.w")] == ["base_model.model.layers.w", "d.w"]


def test_a_rename_of_the_expert_files_of_xlora(tmp_path, experts):
    from support.xlora_models import llama

    from peftk import XLoraConfig

    for name, folder in experts.items():
        shutil.copytree(folder, tmp_path / name)
        file = tmp_path / name / "adapter_model.safetensors"
        save_file({k.replace(PREFIX, PREFIX + "module."): v for k, v in load_file(file).items()}, file)
    config = XLoraConfig(hidden_size=llama().config.hidden_size, adapters=experts)
    model = get_peft_model(llama(), config).eval()
    model.save_pretrained(tmp_path / "mixed")
    renamed = {name: str(tmp_path / name) for name in experts}
    with pytest.raises(CheckpointError, match=r"prefix 'module\.'"):
        PeftModel.from_pretrained(llama(), tmp_path / "mixed", adapters=renamed)
    mapping = {r"^module\.": ""}
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "mixed", adapters=renamed, key_mapping=mapping)
    tokens = torch.arange(4)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_message_about_a_field_names_the_file(tmp_path):
    saved(tmp_path, "lora", {})
    file = tmp_path / "adapter_config.json"
    good = json.loads(file.read_text())
    for values, error in (
        ({"r": 0}, ValueError),
        ({"r": "8"}, TypeError),
        ({"peft_type": "NONE"}, ValueError),
        ({"use_qalora": True}, NotImplementedError),
        ({"target_modules": ["nothing"]}, ValueError),
        ({"target_modules": "("}, ValueError),
        ({"bias": "some"}, ValueError),
    ):
        file.write_text(json.dumps(good | values))
        with pytest.raises(error, match=re.escape(str(file))) as caught:
            PeftModel.from_pretrained(Model(), tmp_path)
        assert "\"'" not in str(caught.value)
        with pytest.raises(error, match=re.escape(str(file))):
            get_peft_model(Model(), CONFIGS["lora"]).load_adapter(tmp_path, "second")


def test_a_warning_about_a_field_names_the_file(tmp_path):
    saved(tmp_path, "lora", {})
    weights, file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(load_file(weights), weights, {"format": "pt"})
    good = json.loads(file.read_text())
    for values, said in (
        ({"from_the_future": 1}, "these keys are not known"),
        ({"rank_pattern": {"nothing": 2}}, "rank_pattern: these keys match no adapted module"),
        ({"exclude_modules": ["nothing"]}, "exclude_modules: .* matches none"),
    ):
        file.write_text(json.dumps(good | values))
        with pytest.warns(UserWarning, match=f"^{re.escape(str(file))}: .*{said}"):
            PeftModel.from_pretrained(Model(), tmp_path)
    # Nothing of it stays behind.
    with pytest.warns(UserWarning, match=r"^exclude_modules: "):
        get_peft_model(Model(), LoraConfig(target_modules=["q_proj"], exclude_modules=["nothing"]))


@pytest.mark.parametrize(
    ("source", "targets", "words"),
    [
        ({"names": ("query", "value")}, ["query", "value"], "2 renames"),
        ({"path": "module.model.layers"}, ["module.model.layers.0.attention.q_proj"], "the prefix 'module.', which"),
        ({"path": "layers", "names": ("query", "v_proj")}, ["layers.1.attention.query"], "the prefix"),
    ],
    ids=["renames", "whole name", "both"],
)
def test_targets_of_the_file_are_renamed_too(tmp_path, source, targets, words):
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(Model(**source), config).eval()
    model.save_pretrained(tmp_path)
    said = message(tmp_path)
    first = said.splitlines()[0]
    assert (
        first.startswith(f"{tmp_path / 'adapter_config.json'}: target_modules: the names of the modules")
        and words in first
    )
    mapping = eval(re.search(r"key_mapping=(\{.*\}) to from_pretrained", first)[1])
    loaded = PeftModel.from_pretrained(Model(), tmp_path, key_mapping=mapping)
    torch.testing.assert_close(loaded(X), model(X))
    loaded.load_adapter(tmp_path, "default", key_mapping=mapping)
    torch.testing.assert_close(loaded(X), model(X))
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(PeftModel.from_pretrained(Model(), tmp_path / "again")(X), model(X))
