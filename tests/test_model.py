"""PeftModel: targets, several adapters, merging, files, and failures that change nothing."""

from __future__ import annotations

import copy
import json
import pickle
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2Model

from peftk import targets
from peftk.model import PeftModel, get_peft_model
from peftk.nn import LoraConfig, LoRALinear, OFTConfig, OFTLinear
from peftk.testing.compare import assert_close

X = torch.linspace(-1, 1, 36).reshape(3, 12)


class Block(nn.Module):
    """One layer of the toy model."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(12, 12)
        self.value = nn.Linear(12, 12)
        self.conv = nn.Conv1d(1, 1, 1)

    def forward(self, x):
        return x + self.value(self.query(x).relu())


class Toy(nn.Module):
    """Three layers and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.classifier = nn.Linear(12, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def toy(seed=0):
    torch.manual_seed(seed)
    return Toy()


def lora(**kwargs):
    return LoraConfig(**({"r": 2, "target_modules": ["query"], "init_lora_weights": False} | kwargs))


def oft(**kwargs):
    return OFTConfig(**({"oft_block_size": 4, "target_modules": ["query"], "init_weights": False} | kwargs))


def snapshot(model):
    """Everything that a failed call must leave alone."""
    modules = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
    tensors = {
        name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)
    }
    extra = None
    if isinstance(model, PeftModel):
        layers = dict(model.base_model.layers())
        extra = (
            {name: config.to_dict() for name, config in model.peft_config.items()},
            list(model.active_adapters),
            {
                path: (layer.active_adapters, layer.merged_adapters, layer.disable_adapters)
                for path, layer in layers.items()
            },
            {path: dict(layer.scaling) for path, layer in layers.items() if isinstance(layer, LoRALinear)},
        )
    return modules, tensors, copy.deepcopy(extra)


def assert_unchanged(model, before):
    modules, tensors, extra = snapshot(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    for name, (identity, requires_grad, value) in tensors.items():
        assert (identity, requires_grad) == before[1][name][:2], name
        assert (
            torch.equal(
                value,
                before[1][name][2],
            )
            or value.isnan().any()
        ), name
    assert extra == before[2]


# -- targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "expected"),
    [
        (["query"], {}, ["layers.0.query", "layers.1.query", "layers.2.query"]),
        (["1.query", "classifier"], {}, ["layers.1.query", "classifier"]),
        (r"layers\.[01]\.value", {}, ["layers.0.value", "layers.1.value"]),
        (["query", "value"], {"layers_to_transform": 2}, ["layers.2.query", "layers.2.value"]),
        (["value"], {"layers_to_transform": [0, 2], "layers_pattern": "layers"}, ["layers.0.value", "layers.2.value"]),
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
    assert [path for path, _ in model.base_model.layers()] == expected


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("bert", ["query", "value"]),
        ("vit", ["query", "value"]),
        ("dinov2", ["query", "value"]),
        ("chatglm", ["query_key_value"]),
    ],
)
def test_default_targets_follow_the_model_type(kind, names):
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in (*names, "dense")})
    model.config = types.SimpleNamespace(model_type=kind)
    assert targets.resolve(model, LoraConfig()) == names


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        (lora(target_modules=["qurey"]), ValueError, "'qurey' .closest: query"),
        (lora(target_modules=["query", "vlaue"]), ValueError, "'vlaue' .closest: value"),
        (lora(target_modules="layers.9.*"), ValueError, "matches no module"),
        (lora(target_modules=None), ValueError, "no default for model type None"),
        (lora(exclude_modules=["query"]), ValueError, "left out"),
        (lora(layers_to_transform=7), ValueError, "left out"),
        (
            lora(target_modules=["query", "conv"]),
            TypeError,
            r"'layers.0.conv' is a torch.nn.modules.conv.Conv1d.*nn.Linear",
        ),
        (lora(target_modules=["layers"]), TypeError, "ModuleList"),
        (lora(modules_to_save=["clasifier"]), ValueError, "modules_to_save.*closest: classifier"),
        (lora(target_modules=["classifier"], modules_to_save=["layers"]), TypeError, "modules_to_save.*ModuleList"),
        (oft(oft_block_size=4, target_modules=["query", "conv"]), TypeError, "Conv1d"),
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


def test_modules_that_no_file_can_hold_are_refused_before_training():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = snapshot(model)
    with pytest.raises(TypeError, match="num_batches_tracked"):
        get_peft_model(model, lora(target_modules=["0"], modules_to_save=["1"]))
    assert_unchanged(model, before)


def test_the_configuration_of_the_caller_is_not_changed():
    config = lora(target_modules="all-linear", task_type="SEQ_CLS")
    values = config.to_dict()
    model = get_peft_model(toy(), config)
    assert config.to_dict() == values
    assert model.peft_config["default"].target_modules == {
        f"layers.{i}.{n}" for i in range(3) for n in ("query", "value")
    }


def test_conv1d_of_gpt2_is_refused_by_name():
    model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    for spec in (None, "all-linear"):
        with pytest.raises(TypeError, match=r"'h.0.attn.c_attn' is a transformers.*Conv1D.*nn.Linear"):
            get_peft_model(model, LoraConfig(target_modules=spec))


def test_patterns_that_match_nothing_are_reported():
    with pytest.warns(UserWarning, match=r"rank_pattern.*\['nothing'\]"):
        get_peft_model(toy(), lora(rank_pattern={"nothing": 3}))


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


# -- adapters -----------------------------------------------------------------------------------------------------


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_adapters_come_and_go():
    base = toy()
    expected = base(X)
    model = get_peft_model(base, lora())
    first = model(X)
    torch.manual_seed(1)
    model.add_adapter("other", lora(r=3, target_modules=["query", "value"]))
    assert torch.equal(model(X), first)
    assert all(".default." in name for name in trainable(model))
    model.set_adapter("other")
    second = model(X)
    assert all(".other." in name for name in trainable(model))
    assert len(trainable(model)) == 12
    assert model.active_adapter == "other"
    assert model.active_adapters == ["other"]
    model.set_adapter(["default", "other"])
    assert len(trainable(model)) == 18
    assert not torch.equal(model(X), second)
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(model(X), first)
    assert not trainable(model)
    with pytest.raises(ValueError, match=r"'othre' .closest: other"):
        model.set_adapter("othre")
    with pytest.warns(UserWarning, match="'other' is active now"):
        model.delete_adapter("default")
    assert torch.equal(model(X), second)
    assert list(model.peft_config) == ["other"]
    model.delete_adapter("other")
    assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match="unknown"):
        model.delete_adapter("other")


def test_two_methods_on_different_layers():
    model = get_peft_model(toy(), oft())
    torch.manual_seed(1)
    model.add_adapter("b", lora(target_modules=["value"]))
    with pytest.raises(ValueError, match=r"'layers.0.query' has a OFTLinear already"):
        model.add_adapter("c", lora())
    model.set_adapter(["default", "b"])
    y = model(X)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(merged(X), y.double(), torch.float32)
    assert {type(layer) for _, layer in model.base_model.layers()} == {OFTLinear, LoRALinear}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("config", [lora(modules_to_save=["classifier"]), oft()], ids=["lora", "oft"])
def test_disabling_restores_everything(config, merged):
    base = toy()
    expected = base(X)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(1)
    model.set_adapter("default", inference_mode=True)
    if merged:
        model.merge_adapter(keep_base="cpu")
    before, y = snapshot(model), model(X)
    with pytest.raises(KeyError), model.disable_adapter():
        assert torch.equal(model(X), expected)
        with model.disable_adapter():
            assert torch.equal(model(X), expected)
        assert torch.equal(model(X), expected)
        raise KeyError
    assert_unchanged(model, before)
    assert torch.equal(model(X), y)


def test_fully_trained_modules():
    model = get_peft_model(toy(), lora(task_type="SEQ_CLS"))
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    model.add_adapter("other", lora(modules_to_save=["classifier"]))
    assert "base_model.model.classifier.modules_to_save.default.weight" in trainable(model)
    assert model.get_base_model().classifier.out_features == 4
    model.add_adapter("third", lora(modules_to_save=["0.conv", "classifier"], exclude_modules=["0.query"]))
    model.set_adapter("other")
    before = snapshot(model)
    with pytest.raises(ValueError, match="only one of"):
        model.set_adapter(["third", "other"])
    assert_unchanged(model, before)
    assert {n for n in trainable(model) if "classifier" in n} == {
        "base_model.model.classifier.modules_to_save.other.weight",
        "base_model.model.classifier.modules_to_save.other.bias",
    }
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["other"].weight.add_(1)
    y = model(X)
    merged = copy.deepcopy(model).merge_and_unload()
    assert isinstance(merged.classifier, nn.Linear)
    assert_close(merged(X), y.double(), torch.float32)
    assert torch.equal(model.unload().classifier.weight, toy().classifier.weight)


def test_biases_follow_the_active_adapter():
    model = get_peft_model(toy(), lora(bias="all"))
    every = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    assert every <= trainable(model)
    with pytest.raises(ValueError, match="bias"):
        model.add_adapter("other", lora(bias="lora_only"))
    model.add_adapter("other", lora())
    model.set_adapter("other")
    assert not every & trainable(model)
    model.set_adapter("default")
    assert every <= trainable(model)
    with pytest.warns(UserWarning, match="bias='all'"), model.disable_adapter():
        pass


# -- merging ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [lora(), oft()], ids=["lora", "oft"])
def test_merging_and_unmerging(config):
    base = toy()
    weights = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, config)
    y, before = model(X), snapshot(model)
    model.merge_adapter(safe_merge=True)
    assert_close(model(X), y.double(), torch.float32)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert_unchanged(model, before)
    with pytest.raises(TypeError, match="adapter_names"):
        model.merge_adapter("default")
    with pytest.raises(ValueError, match="adapter_names"):
        model.merge_adapter(["nobody"])
    merged = copy.deepcopy(model).merge_and_unload(progressbar=True, safe_merge=True)
    assert type(merged) is Toy
    assert not any(isinstance(m, (LoRALinear, OFTLinear)) for m in merged.modules())
    assert_close(merged(X), y.double(), torch.float32)
    model.merge_adapter()
    unloaded = model.unload()
    assert unloaded is base
    assert unloaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(v, weights[k]) for k, v in unloaded.state_dict().items())


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_failed_safe_merge_changes_nothing(method):
    model = get_peft_model(toy(), lora())
    torch.manual_seed(1)
    model.add_adapter("other", lora())
    model.merge_adapter(["other"])
    with torch.no_grad():
        model.get_base_model().layers[2].query.lora_A["default"].weight.fill_(float("inf"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="safe_merge"):
        getattr(model, method)(adapter_names=["default"], safe_merge=True)
    assert_unchanged(model, before)


def test_a_shared_weight_is_not_merged_behind_its_owner():
    base = toy()
    base.layers[1].query.weight = base.layers[0].value.weight
    model = get_peft_model(base, lora())
    before = snapshot(model)
    with pytest.raises(ValueError, match="shared"):
        model.merge_adapter()
    assert_unchanged(model, before)


# -- files --------------------------------------------------------------------------------------------------------


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
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["main"]


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
    assert torch.equal(PeftModel.from_pretrained(toy(), tmp_path)(X), model(X))


def test_bad_arguments_are_refused_by_name(tmp_path):
    model = get_peft_model(toy(), lora())
    (tmp_path / "file").write_text("")
    calls = {
        "safe_serialization": lambda: model.save_pretrained(tmp_path, safe_serialization=False),
        "save_embedding_layers": lambda: model.save_pretrained(tmp_path, save_embedding_layers=True),
        "save_directory": lambda: model.save_pretrained(tmp_path / "file"),
        "selected_adapters": lambda: model.save_pretrained(tmp_path, selected_adapters=["nobody"]),
        "model_id": lambda: PeftModel.from_pretrained(toy(), tmp_path / "nowhere"),
        "is_trainable": lambda: PeftModel.from_pretrained(toy(), tmp_path, is_trainable=1),
        "mixed": lambda: get_peft_model(toy(), lora(), mixed=True),
        "low_cpu_mem_usage": lambda: get_peft_model(toy(), lora(), low_cpu_mem_usage=True),
        "peft_config": lambda: get_peft_model(toy(), {"r": 8}),
        "model: it is a PeftModel": lambda: get_peft_model(model, lora()),
        "model: module 'layers.0.query' is adapted": lambda: get_peft_model(model.get_base_model(), lora()),
        "model: expected": lambda: get_peft_model(None, lora()),
        "exists already": lambda: model.add_adapter("default", lora()),
        "adapter_name": lambda: model.add_adapter("../evil", lora()),
    }
    for text, call in calls.items():
        before = snapshot(model)
        with pytest.raises((TypeError, ValueError), match=text):
            call()
        assert_unchanged(model, before)
    with pytest.raises(NotImplementedError, match="adapter_names"):
        model(X, adapter_names=["default"])


# -- as part of torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [lora(lora_dropout=0.2), oft(module_dropout=0.2)], ids=["lora", "oft"])
def test_gradient_checkpointing_of_a_transformer(config):
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 40,
    }
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**sizes, num_labels=3))
    plain = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    base.gradient_checkpointing_enable()
    checkpointed = get_peft_model(base, copy.deepcopy(config))
    checkpointed.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, checkpointed):
        torch.manual_seed(2)
        model.train()(input_ids=torch.arange(12).reshape(2, 6), labels=torch.tensor([0, 2])).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in results[0].items():
        assert grad is not None
        assert_close(results[1][name], grad.double(), torch.float32, what=name)


@pytest.mark.parametrize("config", [lora(modules_to_save=["classifier"]), oft(bias="all")], ids=["lora", "oft"])
def test_every_trainable_tensor_moves_and_copies_are_equal(config):
    model = get_peft_model(toy(), config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(X).square().sum().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # The toy never runs its convolutions, whose biases bias="all" trains as well.
    assert moved == {n for n in trainable(model) if ".conv." not in n}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))
        assert trainable(twin) == trainable(model)


def test_a_whole_model_compiles_in_one_graph():
    for config in (lora(), oft()):
        torch._dynamo.reset()
        model = get_peft_model(toy(), config)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(X), model(X).double(), torch.float32)


def test_attributes_and_counts(capsys):
    base = toy()
    base.name_or_path = "some/model"
    model = get_peft_model(base, lora(), revision="abc")
    assert model.classifier is base.classifier
    assert model.peft_config["default"].base_model_name_or_path == "some/model"
    assert model.peft_config["default"].revision == "abc"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing
    total = sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    assert (
        capsys.readouterr().out
        == f"trainable params: 144 || all params: {total:,} || trainable%: {14400 / total:.4f}\n"
    )
