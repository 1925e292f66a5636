"""Adapters on linear layers with quantised weights: torchao, bitsandbytes, and a weight that nobody may read."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout

import peft
import pytest
import torch
from support.layer_cases import CASES, IDENTITIES, ROTATING, I, O, make, reference
from support.quantised import (
    BACKEND,
    LIBRARIES,
    QUANTISE,
    WEIGHT,
    Locked,
    adapter_parameters,
    bnb,
    dequantised,
    dynamic,
    linear,
    locked,
    net,
    severed,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import peftk
from peftk import LoraConfig, PeftModel, get_peft_model
from peftk.methods._base_layer import plain_tensors
from peftk.methods._quantised import dequantised as read_weight
from peftk.nn import AdapterLayer, LoRALinear, layer_class_for
from peftk.nn.xlora.layer import GATED, Gates
from peftk.testing.compare import assert_close, assert_same_bits

METHODS = [name for name, case in CASES.items() if case.base == "linear" and not case.decomposes]
FRESH = [name for name, case in IDENTITIES.items() if case.base == "linear"]
# DoRA reads the weight.
EVERY = [(name, kind) for name in METHODS for kind in QUANTISE] + [("dora", kind) for kind in LIBRARIES]


def pair(case, kind, bias=True):
    """An adapted quantised layer, and the same adapter on a dense layer with the dequantised weight."""
    dense = make(case, bias=bias)
    base = QUANTISE[kind](linear(bias=bias))
    with torch.no_grad():
        dense.base_layer.weight.copy_(dequantised(base))
        if bias:
            dense.base_layer.bias.copy_(base.bias)
    layer = layer_class_for(case.config, base)(base, case.config)
    with torch.no_grad():
        for name, p in adapter_parameters(dense).items():
            adapter_parameters(layer)[name].copy_(p)
    return layer, dense


# -- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_output_and_gradients_follow_the_formula(name, kind):
    case = CASES[name]
    # Where the processor has instructions for it, bitsandbytes packs 4-bit weights anew in evaluation mode.
    for bias, shape in ((True, (2, 3, I)), (False, (1, I))):
        layer, dense = pair(case, kind, bias)
        assert plain_tensors(layer.base_layer, torch.randn(shape)) is None
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        weights = torch.randn(y.shape)
        (y * weights).sum().backward()
        # COFT moves its parameters in the forward pass.
        dense(x)
        truth = reference(dense, x)
        mine, theirs = adapter_parameters(layer), adapter_parameters(dense)
        trained = [name for name, p in theirs.items() if p.requires_grad]
        assert trained == [name for name, p in mine.items() if p.requires_grad]
        expected = torch.autograd.grad((truth * weights).sum(), [x, *(theirs[name] for name in trained)])
        assert_close(y, truth, torch.float32)
        for what, grad, want in zip(
            ["input", *trained], [x.grad, *(mine[name].grad for name in trained)], expected, strict=True
        ):
            assert_close(grad, want.double(), torch.float32, what=what)
        assert {p.dtype for p in mine.values()} == {torch.float32}


@pytest.mark.parametrize("kind", LIBRARIES)
def test_dora_is_that_of_peft_and_drops_the_input_of_both_products(kind):
    if kind == "bnb_nf4" and pytest.importorskip("bitsandbytes").functional.has_avx512bf16():
        pytest.skip("without gradients bitsandbytes takes multiples of 32 outputs on this CPU")
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=0.5, init_lora_weights=False)
    torch.manual_seed(0)
    ours = get_peft_model(nn.Sequential(QUANTISE[kind](linear())), config)
    values = {"r": 2, "target_modules": ["0"], "use_dora": True, "init_lora_weights": False}
    theirs = peft.get_peft_model(nn.Sequential(QUANTISE[kind](linear())), peft.LoraConfig(**values))
    theirs.load_state_dict({n: p for n, p in ours.state_dict().items() if "lora_" in n}, strict=False)
    with torch.no_grad():
        ours.get_base_model()[0].lora_magnitude_vector["default"].weight.mul_(1.5)
        theirs.base_model.model[0].lora_magnitude_vector["default"].weight.mul_(1.5)
    x = torch.randn(6, I)
    assert_close(ours.eval()(x), theirs.eval()(x).double(), torch.float32)
    layer, dense = ours.train().get_base_model()[0], linear()
    with torch.no_grad():
        dense.weight.copy_(dequantised(layer.base_layer))
    other = layer_class_for(config, dense)(dense, config)
    other.load_state_dict({n: p for n, p in layer.state_dict().items() if "base_layer" not in n}, strict=False)
    results = []
    for module in (layer, other):
        torch.manual_seed(7)
        y = module(x)
        y.square().sum().backward()
        results.append({"y": y.detach(), **{n: p.grad for n, p in adapter_parameters(module).items()}})
    for name, value in results[1].items():
        assert_close(results[0][name], value.double(), torch.float32, what=name)


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in FRESH for k in QUANTISE if not IDENTITIES[n].decomposes or k in LIBRARIES]
)
def test_a_fresh_adapter_changes_no_bit(name, kind):
    base = QUANTISE[kind](linear())
    config = IDENTITIES[name].config
    layer = layer_class_for(config, base)(base, config)
    for training in (True, False):
        layer.train(training)
        x = torch.randn(5, I, requires_grad=True)
        assert_same_bits(layer(x), base(x))


@pytest.mark.parametrize("kind", QUANTISE)
def test_several_adapters_act_together(kind):
    base = QUANTISE[kind](linear())
    layer = layer_class_for(CASES["c3a"].config, base)(base, CASES["c3a"].config)
    layer.add_adapter("other", CASES["c3a_one"].config)
    layer.set_adapter(["default", "other"])
    dense = make(CASES["c3a"])
    dense.add_adapter("other", CASES["c3a_one"].config)
    with torch.no_grad():
        dense.base_layer.weight.copy_(dequantised(base))
        dense.base_layer.bias.copy_(base.bias)
        for name, p in adapter_parameters(dense).items():
            p.copy_(adapter_parameters(layer)[name])
    x = torch.randn(4, I, requires_grad=True)
    assert_close(layer(x), reference(dense, x, ["default", "other"]), torch.float32)
    layer.enable_adapters(False)
    assert_same_bits(layer(x), base(x))


@pytest.mark.parametrize("kind", QUANTISE)
def test_experts_of_xlora_act_on_quantised_layers(kind):
    base = QUANTISE[kind](linear())
    config = LoraConfig(r=3, lora_alpha=5, init_lora_weights=False)
    layer = GATED[LoRALinear](base, config, "0")
    layer.add_adapter("1", config)
    layer.set_adapter(["0", "1"])
    layer.gates = Gates(peftk.XLoraConfig(hidden_size=I, adapters={"0": "", "1": ""}), ["0", "1"])
    x = torch.randn(2, 4, I, requires_grad=True)
    weights = torch.rand(2, 4, 1, 2)
    with layer.gates.using(weights):
        y = layer(x)
    truth = nn.functional.linear(x.double(), dequantised(base), base.bias.double())
    for i, name in enumerate(("0", "1")):
        a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        truth = truth + weights[:, :, 0, i : i + 1].double() * (5 / 3) * (x.double() @ a.T @ b.T)
    assert_close(y, truth, torch.float32)


@pytest.mark.parametrize("make_base", [severed, dynamic])
@pytest.mark.parametrize("name", METHODS)
def test_a_layer_that_returns_no_gradient_is_not_trained_through(name, make_base):
    layer = layer_class_for(CASES[name].config, make_base())(base := make_base(), CASES[name].config)
    x = torch.randn(3, I, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"base_layer: this {type(base).__name__}.*passes no gradient"):
        layer(x)
    with torch.no_grad():
        y = layer(x)
    if type(CASES[name].config) not in ROTATING:
        # The first layer of a model trains an adapter that acts beside it.
        assert_close(layer(x.detach()), y.double(), torch.float32)
        layer(x.detach()).sum().backward()
        assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", QUANTISE)
def test_batches_that_mix_adapters(kind):
    base = QUANTISE[kind](linear())
    config = LoraConfig(r=3, init_lora_weights=False)
    layer = LoRALinear(base, config, "a").eval()
    layer.add_adapter("b", config)
    x = torch.randn(3, I, requires_grad=True)
    y = layer(x, adapter_names=["a", "__base__", "b"])
    for row, name in enumerate(("a", None, "b")):
        layer.set_adapter(name or [])
        assert_close(y[row], layer(x)[row].double(), torch.float32)


# -- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass")
def test_lora_is_that_of_peft(kind, tmp_path):
    values = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"], "init_lora_weights": False}
    models = []
    for library in (peftk, peft):
        base = net(kind)
        torch.manual_seed(1)
        models.append(library.get_peft_model(base, library.LoraConfig(**values)))
    ours, theirs = models
    names = [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in ours.named_parameters()]
    assert names == [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in theirs.named_parameters()]
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    printed = []
    for model in models:
        with redirect_stdout(io.StringIO()) as out:
            model.print_trainable_parameters()
        printed.append(out.getvalue())
    assert printed[0] == printed[1]
    results = []
    for model in models:
        x = torch.linspace(-1, 1, 3 * I).reshape(3, I).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append({"output": y.detach(), "input": x.grad, **grads})
    assert results[0].keys() == results[1].keys()
    for what, value in results[0].items():
        assert_close(value, results[1][what].double(), torch.float32, what=what)

    ours.save_pretrained(tmp_path)
    # In evaluation mode, bitsandbytes rounds the activations of 8-bit layers.
    loaded = peft.PeftModel.from_pretrained(net(kind), str(tmp_path)).train()
    x = torch.randn(3, I, requires_grad=True)
    assert_close(loaded(x), ours(x).double(), torch.float32)


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.parametrize("name", ["c3a", "oft", "lokr"])
def test_files_load_on_quantised_and_on_dense_models(name, kind, tmp_path):
    config = copy.deepcopy(CASES[name].config)
    config.target_modules = ["first", "second"]
    model = get_peft_model(net(kind), config)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, I, requires_grad=True)
    again = PeftModel.from_pretrained(net(kind), tmp_path).train()
    assert_same_bits(again(x), model(x))
    dense = PeftModel.from_pretrained(net(), tmp_path)
    with torch.no_grad():
        for part in ("first", "second"):
            getattr(dense, part).base_layer.weight.copy_(dequantised(getattr(model, part).base_layer))
    assert_close(dense(x), model(x).double(), torch.float32)
    # This is the way that the error of a merge on the quantised model names.
    assert_close(dense.merge_and_unload()(x), model(x).double(), torch.float32)


@pytest.mark.parametrize("kind", QUANTISE)
def test_the_status_names_the_library(kind):
    config = copy.deepcopy(CASES["oft"].config)
    config.target_modules = ["first", "second"]
    model = get_peft_model(net(kind), config)
    assert {layer.quantization_backend for layer in model.get_layer_status()} == {BACKEND[kind]}
    status = model.get_model_status()
    assert status.quantization_backend == BACKEND[kind]
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    packed = model.first.base_layer.weight.numel()
    if kind == "bnb_nf4":
        assert packed == I * 8 // 2
        assert status.total_params == sum(p.numel() for p in model.parameters()) + packed + 8 * O // 2
    model.add_adapter("other", LoraConfig(target_modules=["head"]))
    assert model.get_model_status().quantization_backend == "irregular"


@pytest.mark.parametrize("kind", LIBRARIES)
def test_all_linear_layers_of_a_quantised_llama_are_adapted_and_trained(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40))
    for name, part in list(model.named_modules()):
        if isinstance(part, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QUANTISE[kind](part))
    adapted = get_peft_model(model, peftk.C3AConfig(block_size=8, target_modules="all-linear"))
    assert [layer.name for layer in adapted.get_layer_status()] == [
        f"model.model.layers.0.{name}"
        for name in (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
    ]
    tokens = torch.arange(12).reshape(2, 6)
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=1.0)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


# -- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass")
def test_half_precision_parameters_are_those_of_peft(kind):
    made = []
    for library in (peftk, peft):
        for autocast in (True, False):
            base = net().bfloat16()
            base.first = _bnb_half(base.first) if kind == "bnb_nf4" else QUANTISE[kind](base.first)
            base.is_loaded_in_4bit, base.is_loaded_in_8bit = kind == "bnb_nf4", kind == "bnb_int8"
            torch.manual_seed(1)
            config = library.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
            model = library.get_peft_model(base, config, autocast_adapter_dtype=autocast)
            made.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
            if autocast and library is peftk:
                x = torch.randn(2, I, dtype=torch.bfloat16, requires_grad=True)
                y = model.first(x)
                assert y.dtype == torch.bfloat16
                y.sum().backward()
                assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    for mine, other in zip(made[:2], made[2:], strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert_same_bits(value, other[name], name)


def _bnb_half(layer):
    return bnb("Linear4bit", layer, quant_type="nf4", compute_dtype=torch.bfloat16)


def test_the_dtype_of_the_products_decides_where_the_layer_names_it():
    base = locked(linear())
    base.compute_dtype = torch.float16
    assert LoRALinear(base, LoraConfig(r=2), autocast_adapter_dtype=False).lora_A["default"].weight.dtype == torch.half
    dense = linear()
    dense.compute_dtype = torch.float16
    assert LoRALinear(dense, LoraConfig(r=2)).lora_A["default"].weight.dtype == torch.float32


# -- what is refused ------------------------------------------------------------------------------------------------


def test_dora_on_a_weight_that_nobody_can_read_is_refused_by_name(kind="locked"):
    model = net(kind)
    before = [id(module) for module in model.modules()]
    with pytest.raises(NotImplementedError, match=rf"use_dora: .*'first'.*{WEIGHT[kind]}.*LoRA"):
        get_peft_model(model, LoraConfig(target_modules=["first"], use_dora=True))
    assert [id(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    "layer", [Conv1D(4, 4), nn.Conv2d(4, 4, 1), nn.Embedding(4, 4)], ids=lambda m: type(m).__name__
)
def test_other_quantised_layers_are_refused(layer):
    layer = copy.deepcopy(layer)
    del layer.weight
    layer.weight = Locked(8)
    with pytest.raises(TypeError, match=rf"'a\.b'.*{type(layer).__name__}.*Locked.*supported on nn.Linear only"):
        layer_class_for(LoraConfig(), layer, "a.b")


def test_a_linear_layer_that_cannot_multiply_by_its_weight_is_refused():
    layer = linear()
    layer.weight = nn.Parameter(torch.ones(O, I, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"torch.int8, which nn.Linear does not multiply by"):
        layer_class_for(LoraConfig(), layer)


def test_dynamically_quantised_layers_of_torch_are_refused():
    quantised = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    layer = quantised.Linear(4, 4)
    with pytest.raises(TypeError, match=r"'a\.b' is a torch\.ao\.nn\.quantized\.dynamic.*nn\.Linear.*supported"):
        layer_class_for(LoraConfig(), layer, "a.b")


@pytest.mark.parametrize("kind", LIBRARIES)
def test_quantised_modules_cannot_be_trained_in_full(kind):
    model = net(kind)
    config = LoraConfig(target_modules=["first"], modules_to_save=["second"])
    with pytest.raises(TypeError, match=rf"modules_to_save: .*'second' is quantised \({BACKEND[kind]}\)"):
        get_peft_model(model, config)
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())


def test_reading_a_packed_weight_leaves_the_layer_as_it_was():
    """On CPUs with bfloat16 bitsandbytes packs the weight at the first call without gradients."""
    layer = QUANTISE["bnb_nf4"](nn.Linear(64, 64)).eval()
    x = torch.randn(5, 64)
    with torch.no_grad():
        before = layer(x)
        dense = read_weight(layer).float()
        assert_same_bits(layer(x), before)
        assert_same_bits(read_weight(layer).float(), dense)
