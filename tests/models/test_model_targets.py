"""Which modules of a model are adapted, and the refusal of targets that cannot be."""

from __future__ import annotations

import copy
import re
import types

import pytest
import torch
from support.toy_model import METHODS, assert_unchanged, lora, oft, snapshot, toy
from torch import nn
from transformers import AutoConfig, AutoModel, GPT2Config, GPT2Model

from peftk.models import targets
from peftk.models.peft_model import get_peft_model
from peftk.nn import LoraConfig
from peftk.testing.compare import assert_close


@pytest.mark.parametrize(
    ("spec", "options", "expected"),
    [
        (["query"], {}, ["layers.0.query", "layers.1.query", "layers.2.query"]),
        (["1.query", "classifier"], {}, ["layers.1.query", "classifier"]),
        (r"layers\.[01]\.value", {}, ["layers.0.value", "layers.1.value"]),
        (["query", "value"], {"layers_to_transform": 2}, ["layers.2.query", "layers.2.value"]),
        (["value"], {"layers_to_transform": [0, 2], "layers_pattern": "layers"}, ["layers.0.value", "layers.2.value"]),
        # As in PEFT, a whole name is adapted whatever layers_to_transform says.
        (["layers.0.query", "value"], {"layers_to_transform": [1]}, ["layers.0.query", "layers.1.value"]),
        (["query"], {"exclude_modules": ["0.query"]}, ["layers.1.query", "layers.2.query"]),
        (["query"], {"exclude_modules": r".*\.[02]\.query"}, ["layers.1.query"]),
        (
            ["query", "classifier"],
            {"modules_to_save": ["classifier"], "exclude_modules": r".*\.[12]\..*"},
            ["layers.0.query"],
        ),
        (
            "all-linear",
            {"task_type": "SEQ_CLS", "exclude_modules": r".*\.[12]\..*"},
            ["layers.0.query", "layers.0.value"],
        ),
        ("ALL-LINEAR", {"exclude_modules": r"layers.*"}, ["classifier"]),
    ],
)
def test_targets(spec, options, expected):
    model = get_peft_model(toy(), lora(target_modules=spec, **options))
    assert [path for path, _ in model.base_model._layers()] == expected


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("bert", ["query", "value"]),
        ("vit", ["query", "value"]),
        ("dinov2", ["q_proj", "v_proj"]),
        ("chatglm", ["query_key_value"]),
    ],
)
def test_default_targets_follow_the_model_type(kind, names):
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in (*names, "dense")})
    model.config = types.SimpleNamespace(model_type=kind)
    assert targets.resolve(model, LoraConfig()) == names


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "mistral", "t5", "vit", "dinov2"])
def test_default_targets_are_in_the_models_of_transformers(kind):
    """Whatever the installed release calls the projections to queries and values, or the one to both."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    sizes |= {"vocab_size": 16} if kind not in ("vit", "dinov2") else {"image_size": 4, "patch_size": 2}
    sizes = {
        "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 16},
        "t5": {"d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 16},
    }.get(kind, sizes)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes))
    found = targets.resolve(model, LoraConfig(fan_in_fan_out=kind == "gpt2"))
    assert len(found) == {"gpt2": 1, "t5": 6}.get(kind, 2)
    assert all(re.search("attn|attention", name, re.IGNORECASE) for name in found)


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        (lora(target_modules=["qurey"]), ValueError, "'qurey' .closest: query"),
        (lora(target_modules="layers.9.*"), ValueError, "matches no module"),
        (lora(target_modules=None), ValueError, "no default for model type None"),
        (lora(exclude_modules=["query"]), ValueError, "left out"),
        (lora(layers_to_transform=7), ValueError, "left out"),
        (
            lora(target_modules=["query", "conv"]),
            TypeError,
            r"'layers.0.conv' is a torch.nn.modules.conv.ConvTranspose1d.*nn.Linear",
        ),
        (lora(target_modules=["layers"]), TypeError, "ModuleList"),
        (lora(modules_to_save=["clasifier"]), ValueError, "modules_to_save.*closest: classifier"),
        (lora(target_modules=["classifier"], modules_to_save=["layers"]), TypeError, "modules_to_save.*ModuleList"),
        (oft(oft_block_size=4, target_modules=["query", "conv"]), TypeError, "ConvTranspose1d"),
    ],
)
def test_bad_targets_are_refused_and_nothing_changes(config, error, text):
    model, values = toy(), config.to_dict()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        get_peft_model(model, config)
    assert_unchanged(model, before)
    adapted = get_peft_model(model, lora(target_modules=["value"]))
    before = snapshot(adapted)
    with pytest.raises(error, match=text):
        adapted.add_adapter("second", config)
    assert_unchanged(adapted, before)
    assert config.to_dict() == values


def test_a_name_beside_others_that_the_model_has_is_left_out_with_a_warning():
    with pytest.warns(
        UserWarning, match="target_modules: not in the model: 'vlaue' .closest: value.*the other names are adapted"
    ):
        model = get_peft_model(toy(), lora(target_modules=["query", "vlaue"]))
    assert [path for path, _ in model.base_model._layers()] == [f"layers.{i}.query" for i in range(3)]


def test_names_that_transformers_has_changed_mean_the_new_ones():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    base = AutoModel.from_config(AutoConfig.for_model("dinov2", **sizes, image_size=4, patch_size=2))
    with pytest.warns(UserWarning, match="renamed 'query' to 'q_proj', 'value' to 'v_proj' in this model"):
        model = get_peft_model(base, lora(target_modules=["query", "value"]))
    assert {path.rpartition(".")[2] for path, _ in model.base_model._layers()} == {"q_proj", "v_proj"}
    # Where the model has both names, or neither, nothing is guessed.
    both = nn.ModuleDict({"query": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4)})
    assert [path for path, _ in get_peft_model(both, lora()).base_model._layers()] == ["query"]
    with pytest.raises(ValueError, match="'query'"):
        get_peft_model(nn.ModuleDict({"other": nn.Linear(4, 4)}), lora(target_modules=["query"]))


def test_the_configuration_of_the_caller_is_not_changed():
    config = lora(target_modules="all-linear", task_type="SEQ_CLS")
    values = config.to_dict()
    model = get_peft_model(toy(), config)
    assert config.to_dict() == values
    assert model.peft_config["default"].target_modules == {
        f"layers.{i}.{n}" for i in range(3) for n in ("query", "value")
    }


def refusal(**options):
    model = toy()
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        get_peft_model(model, lora(**options))
    assert_unchanged(model, before)
    return str(caught.value)


def test_a_string_that_was_meant_as_a_name():
    said = refusal(target_modules="query")
    assert "a string is one pattern for a whole name" in said and said.endswith("pass the list ['query']")
    for spec in ("query,value", "query|value", "query value"):
        assert refusal(target_modules=spec).endswith("pass the list ['query', 'value']")
    said = refusal(target_modules="qurey")
    assert "pass a list of names" in said and "closest: query" in said
    assert refusal(target_modules=r"layers\.\d+\.k.*").endswith("end in query, value, classifier")
    with pytest.raises(TypeError, match=r"modules_to_save: .* write \['classifier'\]"):
        lora(modules_to_save="classifier")
    with pytest.warns(UserWarning, match="exclude_modules: 'query' matches none of the 6 targeted modules"):
        get_peft_model(toy(), lora(target_modules=["query", "value"], exclude_modules="query"))


def test_a_name_that_nothing_is_like():
    said = refusal(target_modules=["zzz"])
    assert "'zzz' (nothing is named like it); the linear layers of the model end in query, value, classifier" in said
    with pytest.raises(ValueError, match="no linear layer; its Conv2d layers end in 0"):
        get_peft_model(nn.Sequential(nn.Conv2d(1, 1, 1)), lora(target_modules=["zzz"]))
    with pytest.raises(ValueError, match=r"the model has no linear layer$"):
        get_peft_model(nn.Sequential(nn.ReLU()), lora(target_modules=["zzz"]))
    model = get_peft_model(toy(), lora())
    with pytest.raises(ValueError, match=r"'zzz' \(nothing is named like it\); there is default$"):
        model.set_adapter("zzz")


def test_thousands_of_wrong_names_are_counted():
    said = refusal(target_modules=[f"name{i}" for i in range(20_000)])
    assert len(said) < 2000 and "and 19992 more" in said


def test_conv1d_of_gpt2_is_a_linear_layer():
    model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    for spec, names in (
        (None, {"attn.c_attn"}),
        ("all-linear", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ):
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=spec, fan_in_fan_out=True))
        assert {path for path, _ in adapted.base_model._layers()} == {f"h.0.{name}" for name in names}
    with pytest.warns(UserWarning, match="fan_in_fan_out.*set to True"):
        get_peft_model(model, LoraConfig())


def test_layers_that_torch_would_bypass():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = encoder(x)
        model = get_peft_model(encoder, lora(target_modules=["linear1", "linear2"]))
        adapted = model(x)
        assert not torch.equal(adapted, expected)
        model.train()
        encoder.dropout.p = encoder.dropout1.p = encoder.dropout2.p = encoder.self_attn.dropout = 0.0
        assert_close(adapted, model(x).double(), torch.float32)
        assert torch.equal(model.unload().eval()(x), expected)
        assert encoder.activation_relu_or_gelu == 1
    with pytest.raises(TypeError, match="MultiheadAttention"):
        get_peft_model(encoder, lora(target_modules=["out_proj"]))


def test_default_targets_are_those_of_peft():
    import peft
    from peft.utils import constants

    for config in {type(method) for method in METHODS.values()}:
        if not hasattr(peft, config.__name__):
            continue
        theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{config._method.value}_TARGET_MODULES_MAPPING")
        ours = targets.DEFAULT_TARGETS | config._default_targets
        for kind, names in theirs.items():
            assert ours[kind] == names if isinstance(names, str) else {*ours[kind]} == {*names}, (config, kind)
