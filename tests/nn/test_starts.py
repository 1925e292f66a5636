"""PiSSA and OLoRA: adapters that start as a part of the weight, against PEFT and dense weights in float64."""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftk import LoraConfig, PeftModel, get_peft_model
from peftk.nn import layer_class_for
from peftk.testing.compare import assert_close, assert_same_bits

HOWS = ("pissa", "olora", "pissa_niter_4")
X = torch.linspace(-1, 1, 5 * 12).reshape(5, 12).sin()


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), Conv1D(8, 16))


def values(how, **more):
    return {"r": 3, "lora_alpha": 5, "target_modules": ["0"], "init_lora_weights": how} | more


def pair(how, **more):
    torch.manual_seed(3)
    ours = get_peft_model(base(), LoraConfig(**values(how, **more)))
    torch.manual_seed(3)
    return ours, peft.get_peft_model(base(), peft.LoraConfig(**values(how, **more)))


def train(model: nn.Module) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0)
    for _ in range(3):
        optimizer.zero_grad()
        (model(X) * torch.arange(1.0, 9.0)).square().mean().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return grads


GPT2 = {"target_modules": ["2"], "fan_in_fan_out": True}


@pytest.mark.parametrize(
    ("how", "more"),
    [*((how, more) for how in HOWS for more in ({}, {"use_rslora": True})), ("pissa", GPT2), ("pissa_niter_4", GPT2)],
    ids=str,
)
def test_both_libraries_train_and_convert_alike(how, more, tmp_path):
    ours, theirs = pair(how, **more)
    plain = base()
    for model in (ours, theirs):
        assert_close(model(X), plain(X).double(), torch.float32)
        model.save_pretrained(str(tmp_path / ("ours" if model is ours else "theirs") / "start"))
    grads, others = train(ours), train(theirs)
    assert grads.keys() == others.keys()
    for name, grad in others.items():
        assert_close(grads[name], grad.double(), torch.float32, what=name)
    assert_close(ours(X), theirs(X).double(), torch.float32)
    assert (ours(X) - plain(X)).abs().max() > 0.01
    # As they are: both find the start again, unless it is random.
    theirs.save_pretrained(str(tmp_path / "theirs"))
    if how == "pissa_niter_4":
        with pytest.raises(ValueError, match="starts at random numbers that are in no file"):
            PeftModel.from_pretrained(base(), tmp_path / "theirs")
        with pytest.warns(UserWarning, match="written as an ordinary LoRA adapter of twice the rank"):
            ours.save_pretrained(tmp_path / "ours")
    else:
        assert_close(PeftModel.from_pretrained(base(), tmp_path / "theirs")(X), theirs(X).double(), torch.float32)
        ours.save_pretrained(tmp_path / "ours")
    assert_close(peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours"))(X), ours(X).double(), torch.float32)
    assert_close(PeftModel.from_pretrained(base(), tmp_path / "ours")(X), ours(X).double(), torch.float32)
    # Converted.
    for who, model in (("ours", ours), ("theirs", theirs)):
        start = tmp_path / who / "start"
        model.save_pretrained(str(tmp_path / who / "all"), path_initial_model_for_weight_conversion=str(start))
        loaded = PeftModel.from_pretrained(base(), tmp_path / who / "all")
        assert_close(loaded(X), ours(X).double(), torch.float32)
        assert_close(
            peft.PeftModel.from_pretrained(base(), str(tmp_path / who / "all"))(X), ours(X).double(), torch.float32
        )
    files = [load_file(tmp_path / who / "all" / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[1].items():
        assert_close(files[0][key], tensor.double(), torch.float32, what=key)
    written = [json.loads((tmp_path / who / "all" / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for field in ("r", "lora_alpha", "init_lora_weights", "rank_pattern", "alpha_pattern"):
        assert written[0][field] == written[1][field], field


def test_olora_on_gpt2_fails_in_peft():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        peft.get_peft_model(base(), peft.LoraConfig(**values("olora", **GPT2)))(X)
    model = get_peft_model(base(), LoraConfig(**values("olora", **GPT2)))
    assert_close(model(X), base()(X).double(), torch.float32)


def test_an_ordinary_adapter_is_converted_with_its_start_from_a_folder(tmp_path):
    patterns = {"target_modules": ["0", "2"], "rank_pattern": {"2": 2}, "alpha_pattern": {"0": 7}}
    ours, theirs = pair(True, **patterns, fan_in_fan_out=False)
    for who, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(str(tmp_path / who / "start"))
        train(model)
        model.save_pretrained(
            str(tmp_path / who / "all"), path_initial_model_for_weight_conversion=str(tmp_path / who / "start")
        )
        assert_close(PeftModel.from_pretrained(base(), tmp_path / who / "all")(X), ours(X).double(), torch.float32)
    # PEFT leaves modules that are trained in full out of what it converts.
    both = pair("pissa", modules_to_save=["2"])
    for who, model in zip(("ours", "theirs"), both, strict=True):
        model.save_pretrained(str(tmp_path / "full" / who / "start"))
        start = str(tmp_path / "full" / who / "start")
        model.save_pretrained(str(tmp_path / "full" / who), path_initial_model_for_weight_conversion=start)
    keys = [set(load_file(tmp_path / "full" / who / "adapter_model.safetensors")) for who in ("ours", "theirs")]
    assert keys[0] - keys[1] == {"base_model.model.2.weight", "base_model.model.2.bias"}
    with pytest.raises(ValueError, match="expected an existing folder"):
        ours.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=tmp_path / "nothing")
    assert not (tmp_path / "x").exists()
    dora = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion: adapter 'default'"):
        dora.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=tmp_path / "ours" / "start")
    scaled = get_peft_model(base(), LoraConfig(**values("pissa", use_rslora=True, alpha_pattern={"0": 2})))
    with pytest.raises(ValueError, match="use_rslora with rank_pattern"):
        scaled.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=tmp_path / "ours" / "start")


@pytest.mark.parametrize("how", HOWS)
def test_the_weight_stays_what_it_is(how):
    plain = base()
    model = get_peft_model(base(), LoraConfig(**values(how)))
    assert_same_bits(model.get_base_model()[0].base_layer.weight, plain[0].weight)
    train(model)
    y, layer = model(X), model.get_base_model()[0]
    with model.disable_adapter():
        assert_same_bits(model(X), plain(X))
    assert layer.lora_start.default.a.grad is None
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(copied(X), y)
    fresh = get_peft_model(base(1), LoraConfig(**values(how)))
    fresh.load_state_dict(model.state_dict())
    assert_same_bits(fresh(X), y)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    mixed = model.eval()(X, adapter_names=["default", "other", "__base__", "default", "other"])
    assert_close(mixed[0], y[0].double(), torch.float32)
    assert_close(mixed[2], plain(X)[2].double(), torch.float32)
    model.set_adapter(["default", "other"])
    both = model(X)
    model.merge_adapter()
    assert_close(model(X), both.double(), torch.float32)
    with pytest.raises(ValueError, match="starts as a part of the base weight"):
        model.add_adapter("third", LoraConfig(**values("olora")))
    model.unmerge_adapter()
    assert_same_bits(model(X), both)
    layer.set_scale("default", 0.0)
    model.set_adapter("default")
    assert_close(model(X), plain(X).double(), torch.float32)
    layer.set_scale("default", 1.0)
    assert_close(copy.deepcopy(model).merge_and_unload()(X), y.double(), torch.float32)
    assert_same_bits(model.unload()(X), plain(X))


@pytest.mark.parametrize("listened", [False, True])
def test_the_truth_is_a_dense_weight_and_dropout_reaches_what_is_trained(listened):
    torch.manual_seed(0)
    linear = nn.Linear(12, 16)
    config = LoraConfig(**values("pissa", lora_dropout=0.5))
    layer = layer_class_for(config, linear)(linear, config)
    with torch.no_grad():
        layer.lora_A.default.weight.add_(torch.randn(3, 12))
    if listened:
        layer.lora_B.default.register_forward_hook(lambda *_: None)
    start, scale = layer.lora_start.default, layer.scaling["default"]
    rest = linear.weight.double() - scale * start.b.double() @ start.a.double()
    update = scale * layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double()
    assert_close(layer.eval()(X), nn.functional.linear(X.double(), rest + update, linear.bias.double()), torch.float32)
    layer.train()
    torch.manual_seed(5)
    y = layer(X)
    # What dropout adds is a row of the dropped input times the update.
    added = y.double() - nn.functional.linear(X.double(), rest, linear.bias.double())
    seen = added @ torch.linalg.pinv(update).mT
    projector = torch.linalg.pinv(layer.lora_A.default.weight.double()) @ layer.lora_A.default.weight.double()
    kept = [(X.double() * torch.tensor([float(bit) for bit in f"{n:012b}"]) * 2) @ projector for n in range(1 << 12)]
    for row in range(2):
        assert min((option[row] - seen[row]).norm() for option in kept) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(dtype):
    plain = base().to(dtype)
    expected = plain(X.to(dtype))
    model = get_peft_model(plain, LoraConfig(**values("pissa")))
    layer = model.get_base_model()[0]
    assert layer.lora_A.default.weight.dtype is layer.lora_start.default.a.dtype is torch.float32
    assert_close(model(X.to(dtype)), expected.double(), dtype)


def test_what_is_refused():
    for module, match in (
        (nn.Conv2d(12, 8, 1), "'pissa' has no meaning"),
        (nn.Embedding(12, 8), "'pissa' has no meaning"),
        (nn.Linear(12, 2), "needs a rank of at most 2 on module '0', got 3"),
    ):
        with pytest.raises(ValueError, match=match):
            get_peft_model(nn.Sequential(module), LoraConfig(**values("pissa")))
    with pytest.raises(NotImplementedError, match="use_dora"):
        LoraConfig(init_lora_weights="olora", use_dora=True)
    for how in ("pissa_niter_", "pissa_niter_x", "pissa_niter_4 ", "PISSA", "corda"):
        with pytest.raises(NotImplementedError, match="init_lora_weights"):
            LoraConfig(init_lora_weights=how)


def test_a_file_of_another_start_is_not_loaded_over_an_adapter(tmp_path):
    get_peft_model(base(), LoraConfig(**values("pissa"))).save_pretrained(tmp_path)
    for how in (True, "olora"):
        model = get_peft_model(base(), LoraConfig(**values(how)))
        with pytest.raises(ValueError, match="init_lora_weights: the file has 'pissa'"):
            model.load_adapter(tmp_path, "default")
    # How else an adapter starts changes nothing about what it means.
    get_peft_model(base(), LoraConfig(**values("gaussian"))).save_pretrained(tmp_path)
    get_peft_model(base(), LoraConfig(**values(True))).load_adapter(tmp_path, "default")
