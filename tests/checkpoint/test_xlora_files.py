"""X-LoRA: its files, what is refused, and where PEFT is wrong."""

from __future__ import annotations

import copy
import shutil
import warnings

import peft
import pytest
import torch
import torch.utils.checkpoint
from safetensors.torch import load_file, save_file
from support.parity_cases import MODELS, SMALL, TOKENS
from support.toy_model import assert_unchanged, snapshot, toy, trainable
from support.xlora_models import CLASSIFIER, Output, llama, make, pair, save_experts, saved_tokens
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftk import LoraConfig, OFTConfig, PeftModel, XLoraConfig, get_peft_model
from peftk.nn.xlora.layer import XLoraLinear, _fit
from peftk.testing.compare import assert_close


def test_files(experts, tmp_path):
    base = llama()
    ours, theirs = pair(base, experts, xlora_depth=2, xlora_size=8)
    y = ours(TOKENS).logits
    ours.save_pretrained(tmp_path / "saved")
    keys = {f"{CLASSIFIER}layers.{i}.{n}" for i in (0, 3) for n in ("weight", "bias")}
    assert set(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == keys
    # PEFT reads the experts from the folders that the configuration names.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "saved")).eval()
    assert_close(loaded(TOKENS).logits, y.double(), torch.float32)
    # A sub-folder is an ordinary LoRA adapter.
    lora = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "saved" / "1"))
    original = peft.PeftModel.from_pretrained(copy.deepcopy(base), experts["1"])
    assert torch.equal(lora(TOKENS).logits, original(TOKENS).logits)
    # Everything is in the folder, which may be moved; nothing else is opened.
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "moved")
    assert torch.equal(again(TOKENS).logits, y)
    assert not trainable(again)
    assert trainable(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "moved", is_trainable=True)) == keys
    with torch.no_grad():
        again.internal_xlora_classifier.layers[0].weight.zero_()
    again.load_adapter(tmp_path / "moved", "default")
    assert torch.equal(again(TOKENS).logits, y)
    shutil.rmtree(tmp_path / "moved" / "1")
    with pytest.raises(ValueError, match=r"experts are expected in the sub-folders .* missing"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "moved")
    swapped = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "moved", adapters=experts)
    assert torch.equal(swapped(TOKENS).logits, y)
    with pytest.raises(ValueError, match="adapters: expected the folders of 3 experts"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "moved", adapters={"0": experts["0"]})
    with pytest.raises(ValueError, match="adapters: only for X-LoRA"):
        PeftModel.from_pretrained(copy.deepcopy(base), experts["0"], adapters=experts)
    # What PEFT writes, once the tensors that it loses are put back: see the test of the defect below.
    theirs.save_pretrained(str(tmp_path / "theirs"))
    values = {k: v.contiguous() for k, v in theirs.state_dict().items() if k.startswith(CLASSIFIER)}
    save_file(values, tmp_path / "theirs" / "adapter_model.safetensors", metadata={"format": "pt"})
    from_theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", adapters=experts)
    assert_close(from_theirs(TOKENS).logits, theirs(TOKENS).logits.double(), torch.float32)


def test_trained_experts_are_saved(experts, tmp_path):
    base = llama()
    model = make(copy.deepcopy(base), experts, use_trainable_adapters=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    y = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(again(TOKENS).logits, y)
    assert trainable(again) == trainable(model)
    assert any("lora_B.2" in name for name in trainable(model))
    for expert in ("0", "2"):
        assert again.load_adapter(experts[expert], expert) == ([], [])
    assert not torch.equal(again(TOKENS).logits, y)


# -- what is refused ----------------------------------------------------------------------------------------------

NAN = float("nan")
BAD = [
    *(("hidden_size", v) for v in [0, -1, True, 1.5, "16"]),
    *(("adapters", v) for v in [["a"], {"a": 1}, {1: "a"}, "a"]),
    *(("xlora_depth", v) for v in [0, -1, True, 2**70]),
    *(("xlora_size", v) for v in [0, True, 2.0]),
    *(("xlora_dropout_p", v) for v in [1.0, -0.1, NAN, None]),
    *(("softmax_temperature", v) for v in [0, -1, NAN, True]),
    *(("top_k_lora", v) for v in [0, -1, True, 1.5]),
    *(("scaling_pass_value", v) for v in [NAN, None, True, "0"]),
    *(("global_scaling_weight", v) for v in [NAN, 1e300, None]),
    *((name, 1) for name in ("enable_softmax", "enable_softmax_topk", "layerwise_scalings", "use_trainable_adapters")),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        XLoraConfig(**({"hidden_size": 16, "adapters": {"a": "b"}} | {name: value}))


def test_what_peft_warns_about():
    for values, message in (
        ({"adapters": {}}, "hidden_size: None"),
        ({"hidden_size": 16}, "adapters: None"),
        (
            {"hidden_size": 16, "adapters": {}, "enable_softmax": False, "enable_softmax_topk": True},
            "top_k_lora is None",
        ),
        ({"hidden_size": 16, "adapters": {}, "top_k_lora": 1, "enable_softmax_topk": True}, "two softmaxes"),
    ):
        with pytest.warns(UserWarning, match=message):
            XLoraConfig(**values)


def refused(message, base, adapters, kind=ValueError, **values):
    before = snapshot(base)
    name = values.pop("adapter_name", "default")
    with pytest.raises(kind, match=message):
        get_peft_model(base, XLoraConfig(**({"hidden_size": 16, "adapters": adapters} | values)), name)
    assert_unchanged(base, before)


def test_what_does_not_fit_the_model_is_refused(experts, tmp_path):
    base = llama()
    refused("hidden_size: expected 16, that of the model, got 32", base, experts, hidden_size=32)
    refused("adapters: expected at least one expert", base, {})
    refused("top_k_lora: expected an int from 1 to 3, got 4", base, experts, top_k_lora=4)
    refused("adapter_name: '1' is the name of an expert", base, experts, adapter_name="1")
    refused("nothing is downloaded", base, {"a": "someone/an-expert"})
    cached = llama()
    cached.config.use_cache = True
    refused("use_cache: expected False in the configuration", cached, experts)
    odd = {
        "is OFT; only LoRA adapters can be experts": (
            OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
            ValueError,
        ),
        "has lora_bias=True": (LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), NotImplementedError),
        "has use_dora=True": (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), NotImplementedError),
        "has bias='all'": (LoraConfig(r=2, target_modules=["q_proj"], bias="all"), NotImplementedError),
        r"has modules_to_save: \['lm_head'\]": (
            LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
            NotImplementedError,
        ),
    }
    for number, (message, (config, kind)) in enumerate(odd.items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(llama(), config).save_pretrained(tmp_path / str(number))
        refused(message, base, experts | {"odd": str(tmp_path / str(number))}, kind)
    wide = LlamaForCausalLM(LlamaConfig(**(SMALL | {"hidden_size": 32}), use_cache=False))
    refused("lora_A", wide, experts, hidden_size=32)
    adapted = get_peft_model(MODELS["llama"](), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="XLORA cannot be added to a model with adapter 'default', which is LORA"):
        adapted.add_adapter("mixture", XLoraConfig(hidden_size=16, adapters=experts))


def test_models_and_calls_that_have_no_weights_are_refused(experts, tmp_path):
    model = make(llama(), experts)
    for names in (["0", "1"], ["default", "default"]):
        with pytest.raises((ValueError, NotImplementedError), match="adapter_names"):
            model(TOKENS, adapter_names=names)
    with pytest.raises(RuntimeError, match=r"layer 'model.layers.0.self_attn.q_proj' was called outside of a forward"):
        model.get_base_model()(TOKENS)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(NotImplementedError, match="gradient checkpointing: X-LoRA needs use_reentrant=False"):
        model.train()(TOKENS)
    plain = toy()
    paths = save_experts(plain, [{"r": 2, "target_modules": ["query"]}], tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'output_hidden_states'"):
        make(plain, paths, hidden_size=12)(torch.randn(3, 12))
    base, paths = saved_tokens(tmp_path / "tokens")
    base.forward = lambda input_ids, **_: Output(logits=base.embed(input_ids))
    with pytest.raises(TypeError, match="expected a base model that returns hidden_states"):
        make(base, paths)(TOKENS)
    base, paths = saved_tokens(tmp_path / "images")
    base.forward = lambda input_ids, **_: Output(hidden_states=(torch.zeros(2, 16, 5, 5),))
    with pytest.raises(
        ValueError, match=r"expected hidden states \(batch, tokens, hidden_size = 16\), got \(2, 16, 5, 5"
    ):
        make(base, paths)(TOKENS)


def test_the_gate_follows_the_positions_of_the_input():
    gate = torch.randn(2, 3, 5)
    assert _fit(gate, torch.randn(2, 3, 4), "x") is gate
    assert torch.equal(_fit(gate, torch.randn(6, 4), "x"), gate.flatten(0, 1))
    assert torch.equal(_fit(gate, torch.randn(2, 3, 7, 4), "x")[:, :, 6], gate)
    for shape in ((2, 4, 4), (1, 3, 4), (5, 4), (4,), (3, 2, 4)):
        with pytest.raises(ValueError, match=r"layer 'x' got an input of shape"):
            _fit(gate, torch.randn(shape), "x")
    assert issubclass(XLoraLinear, nn.Module)


# -- where PEFT 0.21 is wrong: each test shows both, so that it fails if PEFT is ever put right --------------------


def test_peft_loses_classifier_layers_when_it_saves(experts, tmp_path):
    ours, theirs = pair(llama(), experts)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    # The experts are called 0, 1, ..., and PEFT leaves out every key in which one of these names stands.
    assert set(mine) == {f"{CLASSIFIER}layers.0.weight", f"{CLASSIFIER}layers.0.bias"}
    assert not set(mine) & set(other)
    with pytest.raises(ValueError, match=r"internal_xlora_classifier\.layers\.0"):
        PeftModel.from_pretrained(llama(), tmp_path / "theirs", adapters=experts)


def test_peft_fails_with_gradient_checkpointing(experts):
    _, theirs = pair(llama(), experts)
    theirs.train().get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    loss = theirs(input_ids=TOKENS, labels=TOKENS).loss
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_peft_fails_with_named_experts(experts):
    adapters = dict(zip(("physics", "chemistry", "biology"), experts.values(), strict=True))
    y = make(llama(), adapters)(TOKENS).logits
    assert torch.equal(y, make(llama(), experts)(TOKENS).logits)
    with pytest.raises(KeyError, match="physics"):
        config = peft.XLoraConfig(hidden_size=16, adapters=adapters, task_type="CAUSAL_LM")
        peft.get_peft_model(llama(), config)(input_ids=TOKENS)
