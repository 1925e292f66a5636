"""Names of Hugging Face PEFT: what they return is what PEFT returns for the same model."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from support.beside_peft import both, theirs_of, trained
from support.layer_cases import TOYS
from support.toy_model import X, lora, oft, toy
from support.xlora_models import llama

import peftk
from peftk.nn import PeftConfig
from peftk.testing.compare import assert_close

OF_PEFT = [name for name, found in TOYS.items() if hasattr(peft, type(found.config).__name__)]
TASKS = {
    "CAUSAL_LM": "PeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
    "SEQ_CLS": "PeftModelForSequenceClassification",
    "TOKEN_CLS": "PeftModelForTokenClassification",
    "QUESTION_ANS": "PeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_its_class(task: str) -> None:
    model = peftk.get_peft_model(toy(), lora(task_type=task))
    cls = getattr(peftk, TASKS[task])
    assert isinstance(model, cls) and not isinstance(peftk.get_peft_model(toy(), lora()), cls)
    assert repr(model).startswith(f"{TASKS[task]}(\n  (base_model): LoraModel(")
    assert type(copy.deepcopy(model)) is type(model)


@pytest.mark.parametrize("method", TOYS)
def test_a_method_has_its_class_and_prefix(method: str) -> None:
    config = TOYS[method].config
    model = peftk.get_peft_model(toy(), copy.deepcopy(config))
    name = type(config).__name__.replace("Config", "Model")
    assert type(model.base_model) is getattr(peftk, name) and repr(model.base_model).startswith(f"{name}(")
    if hasattr(peft, name):
        assert model.base_model.prefix == getattr(peft, name).prefix


def test_loading_makes_the_class_of_the_task(tmp_path) -> None:
    peftk.get_peft_model(toy(), lora(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert isinstance(peftk.PeftModel.from_pretrained(toy(), tmp_path), peftk.PeftModelForCausalLM)


def test_what_scripts_read_off_a_model_is_what_peft_says() -> None:
    theirs, ours = both(lora(modules_to_save=["classifier"]))
    for name in ("targeted_module_names", "active_adapter", "prefix"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.modules_to_save == {"classifier"}
    assert ours.base_model_torch_dtype is theirs.base_model_torch_dtype is None
    assert ours.has_active_enabled_adapter
    with ours.disable_adapter():
        assert not ours.has_active_enabled_adapter
    found, expected = (lib.get_layer_status(model) for lib, model in ((peftk, ours), (peft, theirs)))
    assert [dataclasses.asdict(one) for one in found] == [dataclasses.asdict(one) for one in expected]
    found, expected = (lib.get_model_status(model) for lib, model in ((peftk, ours), (peft, theirs)))
    assert dataclasses.asdict(found) == dataclasses.asdict(expected)


@pytest.mark.parametrize("method", OF_PEFT)
def test_layers_are_called_what_peft_calls_them(method: str) -> None:
    config = dataclasses.replace(TOYS[method].config, **({"boft_n_butterfly_factor": 1} if method == "boft" else {}))
    theirs, ours = both(config)
    kinds = [[one.module_type for one in lib.get_layer_status(m)] for lib, m in ((peftk, ours), (peft, theirs))]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_prompt_methods_are_refused_by_name(kind: str) -> None:
    # Scripts ask whether a configuration has one of these types.
    assert lora().peft_type != peftk.PeftType[kind]
    with pytest.raises(ValueError, match=f"peft_type: expected one of .* got '{kind}'"):
        peftk.get_peft_config({"peft_type": kind})


# -- configurations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OF_PEFT)
def test_configurations_of_peft_and_dictionaries_are_converted(method: str) -> None:
    config = TOYS[method].config
    expected = peftk.get_peft_model(toy(), copy.deepcopy(config)).state_dict()
    for given in (theirs_of(config), {k: v for k, v in config.to_dict().items() if v is not None}):
        found = peftk.get_peft_model(toy(), given)
        assert found.peft_config["default"].to_dict().keys() == config.to_dict().keys()
        assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in expected.items()}


def test_what_a_configuration_of_peft_asks_for_beyond_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="layer_replication"):
        peftk.get_peft_model(toy(), peft.LoraConfig(target_modules=["query"], layer_replication=[(0, 1)]))
    with pytest.raises(ValueError, match=r"peft_config: expected one of the methods .* got IA3"):
        peftk.get_peft_model(toy(), peft.IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(TypeError, match="peft_config: expected a configuration of peftk or of Hugging Face PEFT"):
        peftk.get_peft_model(toy(), object())


def test_configurations_in_files(tmp_path) -> None:
    config = lora(r=3, task_type="SEQ_CLS")
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).r == 3
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert peftk.LoraConfig.from_pretrained(tmp_path, r=5).r == 5
    read = PeftConfig.from_json_file(tmp_path / "adapter_config.json")
    assert read["r"] == 3 and peftk.get_peft_config(read).r == 3
    assert peftk.LoraConfig.check_kwargs(r=2) == {"r": 2}
    (tmp_path / "inner").mkdir()
    config.save_pretrained(tmp_path / "inner")
    assert PeftConfig.from_pretrained(tmp_path, subfolder="inner").r == 3
    with pytest.raises(ValueError, match="subfolder"):
        PeftConfig.from_pretrained(tmp_path, subfolder="nowhere")
    for wrong in ({"r": 3}, {"peft_type": "IA3"}):
        with pytest.raises(ValueError, match="peft_type"):
            peftk.get_peft_config(wrong)
    with pytest.raises(TypeError, match="rank"):
        peftk.get_peft_config({"peft_type": "LORA", "rank": 3})


# -- tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OF_PEFT)
def test_the_tensors_of_an_adapter_are_those_of_peft(method: str) -> None:
    # PEFT without its extension has one factor of a butterfly.
    one = {"boft_n_butterfly_factor": 1} if method == "boft" else {}
    config = dataclasses.replace(TOYS[method].config, **one)
    theirs, ours = both(config)
    expected, found = peft.get_peft_model_state_dict(theirs), peftk.get_peft_model_state_dict(ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    again = peftk.get_peft_model_state_dict(ours, state_dict={k: v * 2 for k, v in ours.state_dict().items()})
    assert all(torch.equal(again[key], found[key] * 2) for key in found)
    fresh = peftk.get_peft_model(toy(), copy.deepcopy(config)).eval()
    result = peftk.set_peft_model_state_dict(fresh, found)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "default" in key and "ranknum" not in key]
    assert torch.equal(fresh(X), ours(X))


def test_tensors_that_do_not_fit_change_nothing() -> None:
    model = peftk.get_peft_model(toy(), lora())
    tensors = {key: tensor + 1 for key, tensor in peftk.get_peft_model_state_dict(model).items()}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    odd = next(iter(tensors))
    wrong = tensors | {odd: torch.zeros(1, 1)}
    with pytest.raises(RuntimeError, match=f"size mismatch for {odd}"):
        peftk.set_peft_model_state_dict(model, wrong)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    with pytest.warns(UserWarning, match="left out, because ignore_mismatched_sizes"):
        result = peftk.set_peft_model_state_dict(model, wrong | {"odd": odd}, ignore_mismatched_sizes=True)
    assert result.unexpected_keys == ["odd"] and any(key.startswith(odd[:-7]) for key in result.missing_keys)
    with pytest.raises(ValueError, match="'nobody'"):
        peftk.get_peft_model_state_dict(model, adapter_name="nobody")
    with pytest.raises(ValueError, match="state_dict: expected the state dict of the whole model"):
        peftk.get_peft_model_state_dict(model, state_dict={})
    with pytest.raises(ValueError, match="without adapters of peftk"):
        peftk.get_peft_model_state_dict(toy())
    model.merge_adapter()
    trained_bias = peftk.get_peft_model(toy(), lora(bias="lora_only", lora_bias=True))
    found = peftk.get_peft_model_state_dict(trained_bias)
    trained_bias.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        peftk.set_peft_model_state_dict(trained_bias, found)


def test_biases_that_the_configuration_does_not_train_are_taken_too() -> None:
    model = trained(peftk.get_peft_model(toy(), lora(bias="lora_only")))
    fresh = peftk.get_peft_model(toy(), lora()).eval()
    assert not peftk.set_peft_model_state_dict(fresh, peftk.get_peft_model_state_dict(model)).unexpected_keys
    assert torch.equal(fresh(X), model(X))


def test_merging_again_is_told() -> None:
    model = trained(peftk.get_peft_model(toy(), lora()))
    model.merge_adapter()
    y = model(X)
    with pytest.warns(UserWarning, match="merge_adapter: All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(model(X), y)


def test_files_are_read_and_written_with_a_given_state_dict(tmp_path) -> None:
    model = trained(peftk.get_peft_model(toy(), lora()))
    doubled = {key: value * 2 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled, save_function=torch.save, max_shard_size="5GB")
    found, expected = peftk.load_peft_weights(tmp_path), peftk.get_peft_model_state_dict(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k] * 2) for k in found)
    renamed = peftk.load_peft_weights(tmp_path, key_mapping={"query": "other"})
    assert renamed.keys() == {key.replace("query", "other") for key in found}


@pytest.mark.parametrize("method", TOYS)
def test_the_base_model_in_an_adapted_one(method: str) -> None:
    base = toy()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    config = copy.deepcopy(TOYS[method].config)
    config.modules_to_save = ["classifier"]
    model = trained(peftk.get_peft_model(base, config))
    found = peftk.get_base_model_state_dict(model)
    assert found.keys() == before.keys() and all(torch.equal(found[key], before[key]) for key in before)
    if method != "adaption_prompt":
        model.merge_adapter()
        merged = peftk.get_base_model_state_dict(model)
        assert all(torch.equal(merged[key], before[key]) for key in before)
        with pytest.raises(ValueError, match="merged"):
            peftk.set_base_model_state_dict(model, found)
        model.unmerge_adapter()
    doubled = {key: tensor * 2 for key, tensor in before.items()}
    assert peftk.set_base_model_state_dict(model, doubled) == ([], [])
    assert all(torch.equal(tensor, doubled[key]) for key, tensor in peftk.get_base_model_state_dict(model).items())
    with pytest.raises(RuntimeError, match="Missing key"):
        peftk.set_base_model_state_dict(model, {})
    with pytest.raises(RuntimeError, match="size mismatch"):
        peftk.set_base_model_state_dict(model, doubled | {"classifier.bias": torch.zeros(1)})
    assert peftk.set_base_model_state_dict(model, {"odd": X}, strict=False).unexpected_keys == ["odd"]


@pytest.mark.parametrize("config", [lora(), oft()], ids=["lora", "oft"])
def test_injected_adapters(config: PeftConfig) -> None:
    theirs = peft.inject_adapter_in_model(theirs_of(config), toy())
    base = toy()
    ours = peftk.inject_adapter_in_model(config, base)
    assert ours is base and "default" in ours.peft_config
    expected = peft.get_peft_model_state_dict(trained(theirs))
    assert peftk.get_peft_model_state_dict(ours).keys() == expected.keys()
    peftk.set_peft_model_state_dict(ours, expected)
    assert_close(ours.eval()(X), theirs(X).detach().double(), torch.float32)
    peftk.inject_adapter_in_model(config, ours, "second")
    assert peftk.get_peft_model_state_dict(ours, adapter_name="second").keys() == expected.keys()
    by_keys = peftk.inject_adapter_in_model(
        dataclasses.replace(config, target_modules=None), toy(), state_dict=expected
    )
    assert peftk.get_peft_model_state_dict(by_keys).keys() == expected.keys()
    with pytest.raises(ValueError, match="exists already"):
        peftk.inject_adapter_in_model(config, ours)


@pytest.mark.parametrize("config", [lora(use_dora=True), oft()], ids=["dora", "oft"])
def test_adapters_are_injected_without_memory(config: PeftConfig) -> None:
    saved = peftk.get_peft_model_state_dict(trained(peftk.inject_adapter_in_model(config, toy())))
    expected = peftk.inject_adapter_in_model(config, toy()).eval()
    peftk.set_peft_model_state_dict(expected, saved)
    model = peftk.inject_adapter_in_model(config, toy(), low_cpu_mem_usage=True).eval()
    where = {name: p.device.type for name, p in model.named_parameters()}
    base = set(toy().state_dict())
    assert all((device == "cpu") == (name.replace(".base_layer", "") in base) for name, device in where.items())
    with pytest.raises(ValueError, match="meta device"):
        peftk.set_peft_model_state_dict(model, saved)
    assert where == {name: p.device.type for name, p in model.named_parameters()}
    first, *rest = saved
    peftk.set_peft_model_state_dict(model, {key: saved[key] for key in rest}, low_cpu_mem_usage=True)
    assert [p.device.type for p in model.parameters()].count("meta") == 1
    peftk.set_peft_model_state_dict(model, {first: saved[first]}, low_cpu_mem_usage=True)
    assert torch.equal(model(X), expected(X))
    trainable = {name for name, p in expected.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_an_adapter_taken_from_the_weight_needs_memory() -> None:
    base = toy()
    before = {name: t.clone() for name, t in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"low_cpu_mem_usage: .*pissa"):
        peftk.inject_adapter_in_model(lora(init_lora_weights="pissa"), base, low_cpu_mem_usage=True)
    assert before.keys() == base.state_dict().keys()


def test_disabled_layers_are_restored_one_by_one_and_frozen_meanwhile() -> None:
    model = peftk.get_peft_model(toy(), lora(modules_to_save=["classifier"]))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    layers[0].enable_adapters(False)
    layers[1].lora_B["default"].weight.requires_grad_(False)
    trained_before = {name for name, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        assert all(layer.disable_adapters for layer in layers)
        assert not any(p.requires_grad for p in model.parameters())
    assert [layer.disable_adapters for layer in layers] == [True] + [False] * (len(layers) - 1)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained_before
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained_before


def test_a_configuration_for_loading_is_copied(tmp_path: Path) -> None:
    peftk.get_peft_model(toy(), lora()).save_pretrained(tmp_path)
    config = lora()
    model = peftk.PeftModel.from_pretrained(toy(), tmp_path, config=config)
    assert model.peft_config["default"].inference_mode and not config.inference_mode


def test_frozen_embeddings_are_written_if_asked_for_and_by_peft_always() -> None:
    config = lora(target_modules=["embed_tokens"])
    ours = peftk.get_peft_model(llama(), config)
    theirs = peft.get_peft_model(llama(), theirs_of(config))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers="auto").keys()
    frozen = {key for key in expected if "lora_" not in key}
    assert frozen
    assert peftk.get_peft_model_state_dict(ours).keys() == expected - frozen
    assert peftk.get_peft_model_state_dict(ours, save_embedding_layers=True).keys() >= frozen
    with pytest.raises(ValueError, match="save_embedding_layers"):
        peftk.get_peft_model_state_dict(peftk.get_peft_model(toy(), lora()), save_embedding_layers=True)


def test_layers_print_their_own_class() -> None:
    model = peftk.get_peft_model(toy(), lora())
    assert repr(model.layers[0].query).startswith("LoRALinear(")
    assert model.get_layer_status()[0].module_type == "lora.Linear"


# -- the rest -----------------------------------------------------------------------------------------------------


def test_the_scale_of_all_adapters_for_a_while() -> None:
    model = trained(peftk.get_peft_model(toy(), lora()))
    y = model(X)
    with peftk.rescale_adapter_scale(model, 0.0):
        inside = model(X)
    with model.disable_adapter():
        assert torch.equal(inside, model(X))
    assert torch.equal(model(X), y)
    with pytest.raises(ValueError, match="adapters with a scale"), peftk.rescale_adapter_scale(toy(), 2.0):
        pass


def test_loraplus_groups_are_those_of_peft() -> None:
    from peft.optimizers import create_loraplus_optimizer

    theirs, ours = both(lora(bias="all"))
    options = {"lr": 1e-3, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.1}
    groups = [
        make(model, torch.optim.AdamW, **options).param_groups
        for make, model in ((create_loraplus_optimizer, theirs), (peftk.create_loraplus_optimizer, ours))
    ]
    for one, other in zip(*groups, strict=True):
        assert sorted(p.shape for p in one["params"]) == sorted(p.shape for p in other["params"])
        assert (one["lr"], one["weight_decay"]) == (other["lr"], other["weight_decay"])


def test_preparing_for_few_bits() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.is_loaded_in_4bit = True
    prepared = peftk.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert prepared is model and model.is_gradient_checkpointing
    assert all(p.dtype is torch.float32 and not p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="use_gradient_checkpointing"):
        plain = toy()
        plain.is_loaded_in_8bit = True
        peftk.prepare_model_for_kbit_training(plain)


def test_what_callers_have_stays_as_it_is() -> None:
    base = toy()
    base.layers[0].eval()
    config = lora(target_modules=["value"])
    keys = peftk.get_peft_model_state_dict(peftk.get_peft_model(toy(), lora()))
    model = peftk.inject_adapter_in_model(config, base, state_dict=keys)
    assert config.target_modules == {"value"} and hasattr(model.layers[0].query, "lora_A")
    peftk.get_peft_model_state_dict(model)
    assert not model.layers[0].training and not model.layers[0].query.training and model.layers[1].training
    model = peftk.get_peft_model(toy(), lora())
    model.add_adapter("other", lora())
    with peftk.rescale_adapter_scale(model, 2.0):
        model.delete_adapter("other")
    assert all(layer.scaling.keys() == {"default"} for _, layer in model.base_model._layers())


def test_nothing_is_written_where_there_is_no_memory() -> None:
    tensors = peftk.get_peft_model_state_dict(peftk.get_peft_model(toy(), lora()))
    model = peftk.get_peft_model(toy(), lora()).to("meta")
    with pytest.raises(ValueError, match="meta device"):
        peftk.set_peft_model_state_dict(model, tensors)
    with pytest.raises(ValueError, match="meta device"):
        peftk.set_base_model_state_dict(model, toy().state_dict())
