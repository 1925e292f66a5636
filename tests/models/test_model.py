"""PeftModel: several adapters, merging, copies, compilation, and failures that change nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.toy_model import Toy, X, assert_unchanged, lora, oft, snapshot, toy, trainable
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from peftk.models.peft_model import PeftModel, get_peft_model
from peftk.nn import LoRALinear, OFTLinear
from peftk.testing.compare import assert_close


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
    with pytest.raises(ValueError, match="does not exist"):
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
    assert {type(layer) for _, layer in model.base_model._layers()} == {OFTLinear, LoRALinear}


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
    with pytest.raises(ValueError, match="Only one adapter can be set"):
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


def test_bad_arguments_are_refused_by_name(tmp_path):
    model = get_peft_model(toy(), lora())
    (tmp_path / "file").write_text("")
    calls = {
        "safe_serialization": lambda: model.save_pretrained(tmp_path, safe_serialization=False),
        "save_embedding_layers": lambda: model.save_pretrained(tmp_path, save_embedding_layers="all"),
        "save_directory": lambda: model.save_pretrained(tmp_path / "file"),
        "selected_adapters": lambda: model.save_pretrained(tmp_path, selected_adapters=["nobody"]),
        "model_id": lambda: PeftModel.from_pretrained(toy(), tmp_path / "nowhere"),
        "is_trainable": lambda: PeftModel.from_pretrained(toy(), tmp_path, is_trainable=1),
        "mixed": lambda: get_peft_model(toy(), lora(), mixed=True),
        "low_cpu_mem_usage": lambda: get_peft_model(toy(), lora(), low_cpu_mem_usage=1),
        "peft_type": lambda: get_peft_model(toy(), {"r": 8}),
        "peft_config": lambda: get_peft_model(toy(), 8),
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
