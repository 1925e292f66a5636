"""Weights that are only there while their module is called: offloaded by accelerate, or cast by diffusers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import apply_layerwise_casting
from support.layer_cases import BASES, CASES, example
from support.parity_cases import SMALL
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftk import LoraConfig, PeftModel, get_peft_model
from peftk.methods._base_layer import CONVOLUTIONS

CPU = torch.device("cpu")
CASTS = [name for name, case in CASES.items() if case.base != "conv1d"]
"""What diffusers casts: not GPT-2's Conv1D."""


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def base_of(name):
    torch.manual_seed(0)
    return nn.Sequential(BASES[CASES[name].base][0]())


def adapt(name, base, training=False):
    torch.manual_seed(1)
    config = copy.deepcopy(CASES[name].config)
    config.target_modules = ["0"]
    return get_peft_model(base, config).train(training)


def offload(model):
    return cpu_offload(model, execution_device=CPU)


def cast(model):
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    return model


def rounded(model):
    """What casting to the dtype of storage and back makes of the layers that diffusers casts."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, nn.Embedding)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    return model


def gradients(model, x):
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CASES)
def test_a_base_model_that_is_offloaded(name, tmp_path):
    x = example(CASES[name])
    right = adapt(name, base_of(name))
    model = adapt(name, offload(base_of(name)))
    assert torch.equal(model(x), right(x))
    layer = model.base_model.model[0]
    assert layer.base_layer.weight.is_meta, "the weight is taken away again"
    assert "forward" in layer.base_layer.__dict__, "and the hook is there for the next call"
    right.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(offload(base_of(name)), tmp_path).eval()
    assert torch.equal(read(x), right(x))


@pytest.mark.parametrize("name", CASES)
def test_training_on_a_base_model_that_is_offloaded(name):
    x = example(CASES[name])
    right = gradients(adapt(name, base_of(name), training=True), x)
    found = gradients(adapt(name, offload(base_of(name)), training=True), x)
    assert found.keys() == {name for name in right if right[name] is not None}
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, right[key])


@pytest.mark.parametrize("name", CASES)
def test_an_adapted_model_that_is_offloaded(name, tmp_path):
    x = example(CASES[name])
    right = adapt(name, base_of(name))
    model = offload(adapt(name, base_of(name)))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(x), right(x))
    with model.disable_adapter():
        assert torch.equal(model(x), base_of(name)(x))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base_of(name), tmp_path).eval()(x), right(x))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_what_an_offloaded_model_refuses(name, tmp_path):
    x, right = example(CASES[name]), adapt(name, base_of(name))
    right.save_pretrained(tmp_path)
    model = offload(adapt(name, base_of(name)))
    with pytest.raises(ValueError, match=r"offloaded .on the meta device., where nothing can be written"):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match=r"module '0': merge: the base weight is on the meta device"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"module '0': merge: the base weight is on the meta device"):
        model.merge_and_unload()
    with pytest.raises(RuntimeError, match=r"module '0': the parameters of .* gradients would be lost"):
        model.train()(x)
    assert torch.equal(model.eval()(x), right(x))


@pytest.mark.parametrize("name", [name for name in CASES if "adalora" not in name])
def test_a_second_adapter_on_an_offloaded_model(name):
    model = offload(adapt(name, base_of(name)))
    config = copy.deepcopy(model.peft_config["default"])
    layer, x = model.base_model.model[0], example(CASES[name])
    if any(isinstance(getattr(layer, key), nn.ParameterDict) and getattr(layer, key) for key in layer.parameter_names):
        with pytest.raises(ValueError, match=r"module '0': adapter_name: the parameters in \w+ are offloaded"):
            model.add_adapter("second", config)
        assert list(model.peft_config) == ["default"]
        return
    torch.manual_seed(1)
    model.add_adapter("second", config)
    model.set_adapter("second")
    torch.manual_seed(1)
    both = adapt(name, base_of(name))
    torch.manual_seed(1)
    both.add_adapter("second", config)
    both.set_adapter("second")
    assert torch.equal(model(x), both.eval()(x))


@pytest.mark.parametrize("name", CASTS)
def test_a_base_model_that_is_cast_for_each_call(name):
    x = example(CASES[name])
    model, right = adapt(name, cast(base_of(name))), adapt(name, rounded(base_of(name)))
    layer = model.base_model.model[0]
    assert layer.base_layer.weight.dtype is torch.float8_e4m3fn
    assert torch.equal(model(x), right(x))
    assert layer.base_layer.weight.dtype is torch.float8_e4m3fn
    with pytest.raises(ValueError, match=r"module '0': merge: .* torch.float8_e4m3fn"):
        model.merge_adapter()
    with pytest.raises(RuntimeError, match="module '0': its weight is cast for each call"):
        model.train()(x)


@pytest.mark.parametrize("name", CASTS)
def test_an_adapted_model_that_is_cast_for_each_call(name):
    x = example(CASES[name])
    model, right = cast(adapt(name, base_of(name))), rounded(adapt(name, base_of(name)))
    assert torch.equal(model(x), right(x))
    with pytest.raises(RuntimeError, match="module '0': its weight is cast for each call"):
        model.train()(x)


def test_a_layer_of_another_dtype_without_a_hook_is_refused():
    layer = nn.Linear(4, 4).requires_grad_(False).to(torch.float8_e4m3fn)
    layer.forward = layer.forward
    with pytest.raises(TypeError, match=r"module '0' .* its weight is torch.float8_e4m3fn"):
        get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"]))


def test_batches_that_mix_adapters_on_an_offloaded_model():
    def mixed(away):
        model = adapt("lora", base_of("lora"))
        torch.manual_seed(2)
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        model.eval()
        return offload(model) if away else model

    x = torch.randn(3, 12)
    names = ["second", "__base__", "default"]
    assert torch.equal(mixed(True)(x, adapter_names=names), mixed(False)(x, adapter_names=names))


def test_modules_to_save_of_an_offloaded_model():
    def build(away):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 2))
        config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1", "2"], init_lora_weights=False)
        torch.manual_seed(1)
        return get_peft_model(offload(model) if away else model, config).train()

    x = torch.randn(5, 6)
    model, right = build(True), build(False)
    for one in (model, right):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), right(x))
    copies = model.base_model.model[1].modules_to_save["default"]
    assert not any("_hf_hook" in module.__dict__ for module in copies.modules())
    assert model.base_model.model[1].original_module[0].weight.is_meta
    with model.disable_adapter():
        assert torch.equal(model(x), right.unload()(x))
    model = offload(build(False))
    with pytest.raises(RuntimeError, match=r"modules_to_save: the parameters of .* gradients would be lost"):
        model.base_model.model[2].train()(x)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


@pytest.mark.parametrize("way", ["cpu", "disk", "device_map"])
def test_a_transformers_model(way, tmp_path):
    def adapted(base):
        torch.manual_seed(1)
        return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()

    base = llama()
    if way == "cpu":
        base = cpu_offload(base, execution_device=CPU)
    elif way == "disk":
        base = disk_offload(base, tmp_path, execution_device=CPU)
    else:
        parts = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu"}
        base = dispatch_model(base, {**parts, "lm_head": "disk"}, main_device="cpu", offload_dir=tmp_path)
    model, right = adapted(base), adapted(llama())
    ids = torch.arange(10).view(2, 5)
    assert torch.equal(model(ids).logits, right(ids).logits)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), right.generate(ids, **options))


def test_an_exception_in_a_call_leaves_the_hooks_and_takes_the_weights_away():
    model = adapt("lora_conv", offload(base_of("lora_conv")))
    layer = model.base_model.model[0]
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 5, 5))
    assert layer.base_layer.weight.is_meta
    x = example(CASES["lora_conv"])
    assert torch.equal(model(x), adapt("lora_conv", base_of("lora_conv"))(x))
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), adapt("lora_conv", base_of("lora_conv"))(x))


def test_hooks_of_accelerate_that_follow_each_other_or_forbid_gradients():
    layer = nn.Linear(12, 10)
    first, second = AlignDevicesHook(CPU), AlignDevicesHook(CPU, io_same_device=True)
    second.no_grad = True
    add_hook_to_module(layer, SequentialHook(first, second))
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 12)
    plain = copy.deepcopy(model)
    remove_hook_from_module(plain, recurse=True)
    assert torch.equal(model(x), plain(x))
    layer._hf_hook.no_grad = True
    assert not model(x).requires_grad


def test_a_forward_that_somebody_put_before_the_hooks_is_called():
    layer = nn.Linear(12, 10)
    own = layer.forward
    layer.forward = lambda x: own(x) * 0
    base = offload(nn.Sequential(layer))
    model = get_peft_model(base, LoraConfig(target_modules=["0"])).eval()
    assert not model(torch.randn(3, 12)).any()


def test_a_base_model_without_memory_and_without_hooks_is_refused():
    base = nn.Sequential(nn.Linear(12, 10, device="meta"))
    with pytest.raises(ValueError, match="module '0': its weight is on the meta device"):
        get_peft_model(base, LoraConfig(target_modules=["0"]))
    assert type(base[0]) is nn.Linear


def test_the_switch_of_diffusers_for_the_dtype_of_the_input():
    import peft
    from peft.helpers import disable_input_dtype_casting

    assert peft.__version__
    model = adapt("lora", base_of("lora"))
    x = torch.randn(3, 12)
    with disable_input_dtype_casting(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), adapt("lora", base_of("lora"))(x))
    assert model.base_model.model[0].cast_input_dtype_enabled


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "oft", "lora_conv", "oft_conv", "lora_embedding"])
def test_hooks_that_only_move_inputs_leave_training_as_it_is(name):
    x = example(CASES[name])
    right = gradients(adapt(name, base_of(name), training=True), x)
    model = adapt(name, base_of(name), training=True)
    for module in model.modules():
        if len([*module.parameters(recurse=False)]):
            add_hook_to_module(module, AlignDevicesHook(CPU))
    found = gradients(model, x)
    assert found.keys() == right.keys()
    for key, gradient in found.items():
        assert torch.equal(gradient, right[key])
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    model(x).square().sum().backward()


def test_training_an_adapted_model_that_is_spread_over_devices(tmp_path):
    def trained(spread):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(llama(), config).train()
        if spread:
            parts = {
                "model.embed_tokens": "cpu",
                "model.layers": "cpu",
                "model.norm": "disk",
                "model.rotary_emb": "cpu",
            }
            dispatch_model(
                model.get_base_model(), {**parts, "lm_head": "disk"}, main_device="cpu", offload_dir=tmp_path
            )
        model(torch.arange(10).view(2, 5)).logits.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    right, found = trained(False), trained(True)
    assert found.keys() == right.keys()
    for key, gradient in found.items():
        assert torch.equal(gradient, right[key])
