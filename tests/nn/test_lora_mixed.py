"""Batches in which every sample has a LoRA adapter of its own, beside Hugging Face PEFT's."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.layer_cases import CASES, I, example, make
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import peftk
from peftk.methods import lora
from peftk.nn import LoraConfig, OFTConfig
from peftk.testing.compare import assert_close

NAMES = ["b", "__base__", "default", "b", "missing"]


@pytest.mark.parametrize("limit", [1, 256])
@pytest.mark.parametrize("name", ["lora", "lora_bias", "lora_conv1d", "lora_conv", "lora_pointwise", "lora_embedding"])
def test_every_sample_gets_its_own_adapter(name, limit, monkeypatch):
    monkeypatch.setattr(lora, "MIXED_RANK", limit)
    case = CASES[name]
    layer = make(case, bias=case.base != "embedding").eval()
    torch.manual_seed(5)
    layer.add_adapter("b", LoraConfig(r=2, lora_alpha=7, init_lora_weights=False, fan_in_fan_out=name == "lora_conv1d"))
    for shape in case.shapes():
        unbatched = {"linear": 1, "conv": 3}.get(case.base)
        if shape[0] == 0 or len(shape) == unbatched:
            continue
        x = example(case, (5, *shape[1:]))
        y = layer(x, adapter_names=NAMES)
        for sample, adapter in enumerate(NAMES):
            layer.set_adapter([adapter])
            assert_close(y[sample], layer(x)[sample].double(), torch.float32)
        assert torch.equal(y[1], layer.base_layer(x)[1])
        assert torch.equal(y[4], layer.base_layer(x)[4])


def test_convolutions_with_groups():
    base = nn.Conv2d(8, 6, 3, groups=2)
    layer = peftk.nn.LoRAConv(base, LoraConfig(r=4, init_lora_weights=False)).eval()
    layer.add_adapter("b", LoraConfig(r=2, init_lora_weights=False))
    x = torch.randn(3, 8, 5, 4)
    y = layer(x, adapter_names=["b", "default", "__base__"])
    for sample, adapter in enumerate(["b", "default", "__base__"]):
        layer.set_adapter([adapter])
        assert_close(y[sample], layer(x)[sample].double(), torch.float32)
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(base)), peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    )
    layer.set_adapter("default")
    twin = theirs.get_base_model()[0]
    assert twin.lora_B["default"].weight.shape == layer.lora_B["default"].weight.shape
    for container in ("lora_A", "lora_B"):
        getattr(twin, container).load_state_dict(getattr(layer, container).state_dict(), strict=False)
    assert_close(layer(x), twin(x).double(), torch.float32)
    with pytest.raises(ValueError, match="groups=2"):
        layer.merge()
    with pytest.raises(ValueError, match=r"^r: .*groups=2"):
        layer.add_adapter("c", LoraConfig(r=3))
    with pytest.raises(ValueError, match="use_dora"):
        layer.add_adapter("c", LoraConfig(r=2, use_dora=True))


def models(base, targets, **values):
    pair = []
    for library in (peftk, peft):
        torch.manual_seed(1)
        config = {"r": 3, "target_modules": targets, "init_lora_weights": False} | values
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**config))
        model.add_adapter("b", library.LoraConfig(**(config | {"r": 2})))
        pair.append(model.eval())
    pair[0].load_state_dict(pair[1].state_dict())
    return pair


GPT2_SIZES = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 20}


def test_outputs_and_generation_are_those_of_peft():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, bos_token_id=1, eos_token_id=2))
    ours, theirs = models(base, ["c_attn", "wte"], fan_in_fan_out=True)
    tokens = torch.arange(12).reshape(3, 4)
    names = ["b", "__base__", "default"]
    y = ours(input_ids=tokens, adapter_names=names).logits
    assert_close(y, theirs(input_ids=tokens, adapter_names=names).logits.double(), torch.float32)
    assert_close(y[1], base.eval()(input_ids=tokens).logits[1].double(), torch.float32)
    for options in ({}, {"num_beams": 2}):
        options |= {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "adapter_names": names}
        assert torch.equal(ours.generate(input_ids=tokens, **options), theirs.generate(input_ids=tokens, **options))
    assert_close(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits.double(), torch.float32)


def test_beams_of_an_encoder_and_decoder():
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    ours, theirs = models(base, ["q", "v"])
    tokens = torch.arange(2, 10).reshape(2, 4)
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "adapter_names": ["b", "default"]}
    assert torch.equal(ours.generate(input_ids=tokens, **options), theirs.generate(input_ids=tokens, **options))


def test_what_cannot_be_mixed_is_refused():
    model = peftk.get_peft_model(
        nn.Sequential(nn.Linear(I, I), nn.Linear(I, I)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["0"], use_dora=True))
    model.add_adapter("turned", OFTConfig(oft_block_size=4, target_modules=["1"], init_weights=False))
    x = torch.randn(2, I)
    for names, text in (
        (["default"], "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 2"),
        (["default", "nothing"], r"Trying to infer with non-existing adapter\(s\): nothing"),
        (["default", "dora"], "Cannot pass `adapter_names` when DoRA is enabled"),
        (["default", "turned"], "'turned' is OFT"),
    ):
        with pytest.raises(ValueError, match=f"adapter_names.*{text}"):
            model(x, adapter_names=names)
    with pytest.raises(TypeError, match="adapter_names"):
        model(x, adapter_names="default")
    layer = model.get_base_model()[0]
    for names, text in (("ab", "list"), (["dora"] * 2, "DoRA")):
        with pytest.raises(ValueError, match=text):
            layer(x, adapter_names=names)
    # Layers of other methods run as the base model has them.
    expected = model.get_base_model()[1].base_layer(layer.base_layer(x))
    model.set_adapter(["default", "turned"])
    assert torch.equal(model(x, adapter_names=["__base__"] * 2), expected)
    assert layer.batch_adapters is None
    assert not torch.equal(model(x), expected)
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        model(x, adapter_names=["default", "__base__"])


def trained_alone(model, x, names, targets):
    """Return the gradients of each adapter on its own samples, one pass for each."""
    found = {}
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        if name == "__base__":
            continue
        model.base_model.set_adapter(name)
        model.zero_grad()
        (model(x[rows]) * targets[rows]).sum().backward()
        found |= {
            n: p.grad.clone() for n, p in model.named_parameters() if f".{name}." in f"{n}." and p.grad is not None
        }
    return found


@pytest.mark.parametrize("names", [["a", "a", "b", "b", "c", "__base__"], ["b", "a", "__base__", "c", "a", "b"]])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_adapters_of_one_batch_train_as_each_alone(kind, tokens, names):
    torch.manual_seed(0)
    inside = {"linear": nn.Linear(I, 12), "conv": nn.Conv1d(I, 12, 3, padding=1), "embedding": nn.Embedding(20, 12)}
    base = nn.Sequential(inside[kind], nn.ReLU()).double()
    model = peftk.get_peft_model(base, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=7, target_modules=["0"], init_lora_weights=False))
    model.add_adapter("c", LoraConfig(r=3, use_rslora=True, target_modules=["0"], init_lora_weights=False))
    shape = {"linear": (6, tokens, I), "conv": (6, I, tokens), "embedding": (6, tokens)}[kind]
    x = torch.randint(0, 20, shape) if kind == "embedding" else torch.randn(shape, dtype=torch.float64)
    targets = torch.randn(model(x).shape, dtype=torch.float64)
    expected = trained_alone(model, x, names, targets)
    model.set_requires_grad(["a", "b", "c"])
    model.zero_grad()
    (model.train()(x, adapter_names=names) * targets).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert_close(grad, expected[name], torch.float64, what=name)


def test_every_adapter_of_a_batch_drops_with_its_own_probability():
    layer = peftk.nn.LoRALinear(nn.Linear(64, 8), LoraConfig(r=2, lora_dropout=0.75), "a")
    layer.add_adapter("b", LoraConfig(r=2))
    for name in ("a", "b"):
        nn.init.ones_(layer.lora_A[name].weight), nn.init.ones_(layer.lora_B[name].weight)
    x, names = torch.ones(40, 1, 64), ["a", "b"] * 20
    y = layer.train()(x, adapter_names=names) - layer.base_layer(x)
    assert_close(y[1::2], torch.full_like(y[1::2], 64 * 2 * 4), torch.float32)
    # Each kept element counts four times; five standard deviations of the share that is kept.
    kept = y[::2, 0, 0] / (4 * 2 * 4)
    assert (kept.round() - kept).abs().max() < 1e-3 and kept.unique().numel() > 1
    assert abs(kept.mean().item() / 64 - 0.25) < 5 * (0.25 * 0.75 / (20 * 64)) ** 0.5


def test_checkpointing_of_a_mixed_batch_is_refused():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**GPT2_SIZES))
    model = peftk.get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    model.gradient_checkpointing_enable()
    tokens = torch.arange(8).reshape(2, 4)
    with pytest.raises(ValueError, match="adapter_names: activation checkpointing would run the layers again"):
        model.train()(input_ids=tokens, adapter_names=["default", "__base__"])
    plain = peftk.get_peft_model(nn.Sequential(nn.Linear(I, I)), LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(2, I, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(
        lambda x: (
            plain(x, adapter_names=["default", "__base__"]) if torch._C._current_graph_task_id() == -1 else plain(x)
        ),
        x,
        use_reentrant=False,
    )
    with pytest.raises(RuntimeError, match="backward: activation checkpointing runs layers again"):
        y.sum().backward()


def test_dropout_of_convolutions_is_refused_in_a_mixed_batch():
    layer = peftk.nn.LoRAConv(nn.Conv1d(I, 6, 3), LoraConfig(r=2, lora_dropout=0.5))
    x = torch.randn(2, I, 5)
    with pytest.raises(ValueError, match=r"adapter_names: .* has lora_dropout"):
        layer.train()(x, adapter_names=["default", "__base__"])
    layer.eval()(x, adapter_names=["default", "__base__"])
