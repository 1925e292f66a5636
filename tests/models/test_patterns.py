"""`rank_pattern`, `alpha_pattern` and `block_size_pattern` choose what Hugging Face PEFT chooses, module by module."""

from __future__ import annotations

import copy
import json
import re
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.parity_cases import theirs_of
from support.toy_model import lora, toy
from torch import nn

from peftk.models.peft_model import PeftModel, get_peft_model
from peftk.models.plan import make_plan
from peftk.nn import C3AConfig, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig

# Keys in the order in which they stand in the field: plain endings, whole names, expressions, anchors, several that
# match one module in either order, and names that end in another name.
KEYS = {
    "ending": ["query"],
    "longer ending": ["inner.query"],
    "whole name": ["blocks.0.query"],
    "name at the top": ["query", "my_query"],
    "only at the top": ["my_query"],
    "end of a word": ["uery"],
    "general first": ["query", "blocks.0.query"],
    "special first": ["blocks.0.query", "query"],
    "overlapping": [r"blocks\.\d+\.query", "1.query", ".*query", "value"],
    "anchored": [r"^query", "^blocks.1.query"],
    "anchored at the end": ["query$", r"blocks\.0\.value$"],
    "alternatives": ["query|value"],
    "alternatives in brackets": ["(my_query|value)"],
    "expression": [r"blocks\.[01]\.(query|value)"],
    "wildcard": [".*"],
    "dots are any character": ["blocks.0.value", "inner.query"],
    "a name that is no expression of itself": ["odd+name", "blocks.0.odd+name", "query"],
    "lookahead": [r"(?!my_)query", r"blocks\.(?!0).*"],
}


class Block(nn.Module):
    """Modules whose names end in each other's."""

    def __init__(self, deep=True):
        super().__init__()
        for name in ("query", "my_query", "value", "query_value", "odd+name"):
            self.add_module(name, nn.Linear(32, 32))
        if deep:
            self.inner = Block(deep=False)


class Named(Block):
    """A block that is the top of the model."""

    def __init__(self):
        super().__init__(deep=False)
        self.blocks = nn.ModuleList([Block(), Block()])


METHODS = {
    "lora": (LoraConfig, {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}, {"r": 1, "lora_alpha": 1}),
    "loha": (LoHaConfig, {"rank_pattern": "r", "alpha_pattern": "alpha"}, {"r": 1, "alpha": 1}),
    "lokr": (
        LoKrConfig,
        {"rank_pattern": "r", "alpha_pattern": "alpha"},
        {"r": 1, "alpha": 1, "decompose_factor": 2},
    ),
    "c3a": (C3AConfig, {"block_size_pattern": "block_size"}, {"block_size": 1}),
}
TARGETS = r"(.*\.)?(query|my_query|value|query_value|odd\+name)"


def chosen(model, attributes):
    """What PEFT gave every layer, by its path in the base model."""
    found = {}
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "c3a_kernel"):
            # The size itself is not kept per layer.
            found[path] = {"block_size": module.c3a_kernel["default"].shape[-1]}
        elif hasattr(module, "base_layer"):
            found[path] = {name: getattr(module, name)["default"] for name in attributes}
    return found


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("method", METHODS)
def test_keys_mean_the_modules_that_they_mean_in_peft(method, keys):
    cls, fields, values = METHODS[method]
    for field in fields:
        values = values | {field: {key: 2 ** (1 + i) for i, key in enumerate(KEYS[keys])}}
    base = Named()
    with warnings.catch_warnings():
        # Some keys mean nothing to some methods, which both libraries report.
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), theirs_of(cls)(target_modules=TARGETS, **values))
        plan = make_plan(base, "default", cls(target_modules=TARGETS, **values), strict=False)
    ours = {path: {name: adapter.settings[name] for name in fields.values()} for path, adapter in plan.adapters.items()}
    assert len(ours) == 25
    assert ours == chosen(theirs, fields.values())


@pytest.mark.parametrize("method", METHODS)
def test_files_keep_the_order_of_the_keys_which_those_of_peft_lose(method, tmp_path):
    cls, fields, values = METHODS[method]
    order = {"query": 2, "0.query": 4}
    config = cls(target_modules=["query"], **values | dict.fromkeys(fields, order))
    model = get_peft_model(Named(), config)
    model.save_pretrained(tmp_path / "ours")
    for field in fields:
        assert list(getattr(PeftConfig.from_pretrained(tmp_path / "ours"), field)) == list(order)
    loaded = PeftModel.from_pretrained(Named(), tmp_path / "ours")
    for (_, one), (_, other) in zip(model.base_model._layers(), loaded.base_model._layers(), strict=True):
        assert all(getattr(one, name) == getattr(other, name) for name in fields.values())
    theirs = peft.PeftModel.from_pretrained(Named(), str(tmp_path / "ours"))
    assert all(set(found.values()) == {2} for found in chosen(theirs, fields.values()).values())
    # PEFT sorts the keys when it saves, and cannot load its own file.
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(Named(), str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="shape expected"):
        PeftModel.from_pretrained(Named(), tmp_path / "theirs")
    # Loading over an adapter compares what each layer gets, not how it is written.
    model.load_adapter(tmp_path / "ours", "default")
    with pytest.raises(ValueError, match=f"{next(iter(fields))}: the file has"):
        model.load_adapter(tmp_path / "theirs", "default")
    path = tmp_path / "ours" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: {"query": 2, "other": 4} for key in fields}))
    # Without the digest of the configuration, which does not let it be changed.
    weights = tmp_path / "ours" / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt"})
    model.load_adapter(tmp_path / "ours", "default")


@pytest.mark.parametrize("method", METHODS)
def test_a_key_that_means_no_module_is_told_and_changes_nothing(method):
    cls, fields, values = METHODS[method]
    for field in fields:
        for key in ("qurey", "^blocks.3.query", "blocks"):
            config = cls(target_modules=["query"], **values | {field: {"query": 2, key: 4}})
            told = re.escape(f"{field}: these keys match no adapted module and have no effect: '{key}'")
            with pytest.warns(UserWarning, match=told):
                model = get_peft_model(Named(), config)
            without = get_peft_model(Named(), cls(target_modules=["query"], **values | {field: {"query": 2}}))
            shapes = [{name: p.shape for name, p in one.named_parameters()} for one in (model, without)]
            assert shapes[0] == shapes[1]


def test_a_key_of_a_file_that_means_no_module_is_reported(tmp_path):
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(r=2, target_modules=["query"], rank_pattern={"nothing": 3}))
    theirs.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match=r"rank_pattern.*\['nothing'\]"):
        model = PeftModel.from_pretrained(toy(), tmp_path)
    assert {layer.r["default"] for _, layer in model.base_model._layers()} == {2}
    with pytest.warns(UserWarning, match=r"alpha_pattern.*'qurey' .closest: query"):
        get_peft_model(torch.nn.ModuleDict({"query": nn.Linear(4, 4)}), lora(alpha_pattern={"qurey": 3}))
