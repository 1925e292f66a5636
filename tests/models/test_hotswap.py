"""Hot swapping: what is loaded into a running model is what a fresh model has, and nothing is compiled again."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import xlora_models
from support.toy_model import X, assert_unchanged, lora, oft, snapshot, toy
from torch import nn

import peftk
from peftk import LoraConfig, PeftModel, get_peft_model, hotswap_adapter, prepare_model_for_compiled_hotswap
from peftk.testing.compare import LIMITS, assert_close, error

BOTH = ["query", "value"]


def saved(folder, base=toy, seed=1, **fields):
    """Save a random adapter, and return what a model with it computes."""
    inner = base()
    torch.manual_seed(seed)
    model = get_peft_model(inner, lora(**({"target_modules": BOTH} | fields))).eval()
    model.save_pretrained(folder)
    return model


class Nets(nn.Module):
    """Every kind of layer that LoRA adapts, a convolution with groups among them."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.line = nn.Conv1d(5, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 8, 1, groups=2)
        self.plane = nn.Conv2d(1, 3, 3)
        self.out = nn.Linear(3 * 6 * 6, 4)

    def forward(self, x):
        x = self.grouped(self.line(self.words(x)).relu()).relu()
        return self.out(self.plane(x.unsqueeze(1)).relu().flatten(1))


def nets():
    torch.manual_seed(0)
    return Nets()


ALL = ["words", "line", "grouped", "plane", "out"]
IDS = torch.arange(10).view(2, 5)
KINDS = {
    "linear": (toy, X, {"target_modules": BOTH}),
    "dora": (toy, X, {"target_modules": BOTH, "use_dora": True}),
    "bias": (toy, X, {"target_modules": BOTH, "lora_bias": True}),
    "every kind of layer": (nets, IDS, {"target_modules": ALL}),
}
CHANGES = {
    "the same": {},
    "smaller": {"r": 2},
    "larger": {"r": 8},
    "another scale": {"lora_alpha": 3},
    "rslora": {"r": 8, "use_rslora": True},
    "patterns": {"rank_pattern": {"query": 2, "out": 6}, "alpha_pattern": {"value": 5, "words": 2}},
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_swapped_adapter_is_the_one_of_the_file(kind, change, prepared, tmp_path):
    base, x, fields = KINDS[kind]
    expected = saved(tmp_path / "other", base, seed=2, **{**fields, "r": 4, **CHANGES[change]})
    model = saved(tmp_path / "first", base, **fields, r=4)
    before = model(x)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        assert_close(model(x), before.double(), torch.float32)
    hotswap_adapter(model, tmp_path / "other", "default")
    fresh = PeftModel.from_pretrained(base(), tmp_path / "other")
    assert error(before, fresh(x)).norm > LIMITS[torch.float32]
    assert_close(model(x), fresh(x).double(), torch.float32)
    # Saved, it is the file that was loaded, without the zeros in memory.
    model.save_pretrained(tmp_path / "again")
    tensors = [peftk.load_peft_weights(tmp_path / name) for name in ("other", "again")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
    again = PeftModel.from_pretrained(base(), tmp_path / "again")
    assert torch.equal(again(x), fresh(x))
    assert expected.peft_config["default"].r == model.peft_config["default"].r
    # And back.
    hotswap_adapter(model, tmp_path / "first", "default")
    assert_close(model(x), before.double(), torch.float32)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_that_is_kept_between_calls_outlives_a_swap(kind, prepared, tmp_path):
    """DoRA keeps its gain, and few rows have a way of their own, while nothing is recorded."""
    base, x, fields = KINDS[kind]
    models = [saved(tmp_path / str(seed), base, seed=seed, **fields, r=4, lora_alpha=3 + seed) for seed in (1, 2)]
    model = PeftModel.from_pretrained(base(), tmp_path / "1")
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    for number in (0, 1, 0):
        hotswap_adapter(model, tmp_path / str(number + 1), "default")
        expected = models[number](x).double()
        for _ in range(3):
            assert_close(model(x), expected, torch.float32)
            assert_close(model(x[:1]), expected[:1], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scales_are_as_exact_as_the_weights(dtype, tmp_path):
    expected = saved(tmp_path, r=3, lora_alpha=1, seed=2).to(dtype)
    model = get_peft_model(toy(), lora(target_modules=BOTH, r=4)).to(dtype).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    # They go where the model goes, and keep their own dtype.
    model.to(dtype)
    hotswap_adapter(model, tmp_path, "default")
    assert_close(model(X.to(dtype)), expected(X.to(dtype)).double(), dtype)


def test_compiled_code_is_kept(tmp_path):
    for number, fields in enumerate(({"r": 2}, {"r": 8, "lora_alpha": 3}, {"r": 5, "target_modules": ["query"]})):
        saved(tmp_path / str(number), seed=number, **fields)
    model = PeftModel.from_pretrained(toy(), tmp_path / "0")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, backend="aot_eager")
        compiled(X)
        for number in (1, 2, 0):
            hotswap_adapter(compiled, tmp_path / str(number), "default")
            fresh = PeftModel.from_pretrained(toy(), tmp_path / str(number))
            assert_close(compiled(X), fresh(X).double(), torch.float32)
        # Strengths are written into the same tensors.
        for layer in [layer for _, layer in model.base_model._layers()]:
            layer.set_scale("default", 0.5)
        half = compiled(X)
    for _, layer in fresh.base_model._layers():
        layer.set_scale("default", 0.5)
    assert_close(half, fresh(X).double(), torch.float32)


def test_without_preparation_other_scales_compile_again(tmp_path):
    """What the test above would not notice if code were always kept."""
    saved(tmp_path / "0", r=2)
    saved(tmp_path / "1", r=8)
    model = PeftModel.from_pretrained(toy(), tmp_path / "0")
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, backend="aot_eager")
        compiled(X)
        hotswap_adapter(compiled, tmp_path / "1", "default")
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(X)


def test_modules_that_the_file_lacks_get_zeros(tmp_path):
    saved(tmp_path, r=3, target_modules=["query"], seed=2)
    model = get_peft_model(toy(), lora(target_modules=BOTH, r=4)).eval()
    hotswap_adapter(model, tmp_path, "default")
    assert_close(model(X), PeftModel.from_pretrained(toy(), tmp_path)(X).double(), torch.float32)
    for path, layer in model.base_model._layers():
        assert bool(layer.lora_B["default"].weight.any()) == path.endswith("query")


def test_training_goes_on_with_the_zeros_left_alone(tmp_path):
    saved(tmp_path, r=3, seed=2)
    ends = []
    for prepared in (False, True):
        model = PeftModel.from_pretrained(toy(), tmp_path, is_trainable=True)
        if prepared:
            (model(X).square().sum()).backward()
            prepare_model_for_compiled_hotswap(model, target_rank=8)
            assert all(p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)
            model.zero_grad()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            model(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(peftk.get_peft_model_state_dict(model))
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert_close(ends[1][key], value.double(), torch.float32, what=key)
    for _, layer in model.base_model._layers():
        assert not layer.lora_A["default"].weight[3:].any()
        assert not layer.lora_B["default"].weight[:, 3:].any()


def test_prepared_adapters_load_merge_and_copy_like_others(tmp_path):
    fresh = saved(tmp_path, r=3, seed=2)
    model = get_peft_model(toy(), lora(target_modules=BOTH, r=3)).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    model.load_adapter(tmp_path, "default")
    assert_close(model(X), fresh(X).double(), torch.float32)
    state = peftk.get_peft_model_state_dict(fresh)
    for p in model.parameters():
        if "lora" in type(p).__name__:
            p.data.zero_()
    peftk.set_peft_model_state_dict(model, state)
    assert_close(model(X), fresh(X).double(), torch.float32)
    wrong = {key: value[:2] if "lora_A" in key else value[:, :2] for key, value in state.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        peftk.set_peft_model_state_dict(model, wrong)
    assert_close(copy.deepcopy(model).merge_and_unload()(X), fresh(X).double(), torch.float32)
    model.add_adapter("other", lora(target_modules=BOTH, r=8))
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", "cat")
    model.set_adapter("sum")
    expected = toy()
    for path, layer in model.base_model._layers():
        delta = layer.get_delta_weight("default") + layer.get_delta_weight("other")
        expected.get_submodule(path).weight.data += 0.5 * delta.detach()
    assert_close(model(X), expected(X).double(), torch.float32)


def test_prepared_scales_act_wherever_scales_do(tmp_path):
    """In batches that mix adapters, in a block that rescales them, and when they are set."""
    models = []
    for prepared in (False, True):
        model = saved(tmp_path, r=3, lora_alpha=5)
        torch.manual_seed(7)
        model.add_adapter("other", lora(target_modules=BOTH, r=2))
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=4)
        models.append(model.eval())
    plain, room = models
    names = ["default", "other", "__base__"]
    assert_close(room(X, adapter_names=names), plain(X, adapter_names=names).double(), torch.float32)
    kept = {path: layer.scaling["default"] for path, layer in room.base_model._layers()}
    with peftk.rescale_adapter_scale(room, 0.25), peftk.rescale_adapter_scale(plain, 0.25):
        assert_close(room(X), plain(X).double(), torch.float32)
    for change in (lambda layer: layer.scale_layer(3.0), lambda layer: layer.unscale_layer(2.0)):
        for model in models:
            for _, layer in model.base_model._layers():
                change(layer)
        assert_close(room(X), plain(X).double(), torch.float32)
    assert all(layer.scaling["default"] is kept[path] for path, layer in room.base_model._layers())


def test_experts_of_x_lora_are_refused(experts):
    model = xlora_models.make(xlora_models.llama(), experts)
    with pytest.raises(ValueError, match="is one of X-LoRA, whose experts cannot be swapped"):
        prepare_model_for_compiled_hotswap(model, target_rank=64)


def test_the_configuration_can_get_the_rank_too(tmp_path):
    model = saved(tmp_path / "first", r=2, rank_pattern={"query": 4}, alpha_pattern={"value": 7})
    before = model(X)
    other = LoraConfig(r=4, lora_alpha=6, use_rslora=True)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config={**model.peft_config, "other": other})
    config = model.peft_config["default"]
    assert (config.r, config.rank_pattern) == (8, {"query": 8})
    assert other.r == 8 and other.lora_alpha / 8**0.5 == pytest.approx(6 / 4**0.5)
    model.save_pretrained(tmp_path / "again")
    weights = peftk.load_peft_weights(tmp_path / "again")
    assert {value.shape[0] for key, value in weights.items() if "lora_A" in key} == {8}
    assert_close(PeftModel.from_pretrained(toy(), tmp_path / "again")(X), before.double(), torch.float32)


def refused(model, folder, match, kind=ValueError, **options):
    before = snapshot(model)
    with pytest.raises(kind, match=match):
        hotswap_adapter(model, folder, options.pop("name", "default"), **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("prepared", [False, True])
def test_what_does_not_fit_is_refused_and_changes_nothing(prepared, tmp_path):
    model = saved(tmp_path / "first", r=4)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    saved(tmp_path / "more", target_modules=["query", "value", "classifier"])
    refused(model, tmp_path / "more", r"target_modules: the file adapts \['classifier'\], which adapter 'default'")
    saved(tmp_path / "dora", use_dora=True)
    refused(model, tmp_path / "dora", "use_dora: the file has True, the adapter in memory False")
    saved(tmp_path / "dropout", lora_dropout=0.5)
    refused(model, tmp_path / "dropout", "lora_dropout: the file has 0.5, the adapter in memory 0.0")
    get_peft_model(toy(), oft()).save_pretrained(tmp_path / "oft")
    refused(model, tmp_path / "oft", "adapter_config.json: peft_type: the adapter is OFT; only LoRA")
    get_peft_model(toy(), lora(init_lora_weights="pissa", target_modules=BOTH)).save_pretrained(tmp_path / "pissa")
    refused(model, tmp_path / "pissa", "has init_lora_weights='pissa'")
    if prepared:
        saved(tmp_path / "large", r=8)
        refused(model, tmp_path / "large", r"prepared for rank 6 on module 'layers.0.query', and the file has 8")
    saved(tmp_path / "damaged")
    file = tmp_path / "damaged" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    refused(model, tmp_path / "damaged", "adapter_model.safetensors")
    saved(tmp_path / "wrong")
    config = json.loads((tmp_path / "wrong" / "adapter_config.json").read_text())
    (tmp_path / "wrong" / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    refused(model, tmp_path / "wrong", "sha256 expected")
    file = tmp_path / "wrong" / "adapter_model.safetensors"
    save_file(load_file(file), file)
    refused(
        model,
        tmp_path / "wrong",
        r"adapter_model.safetensors: several problems(.|\n)*expected \(3, 12\), got \(2, 12\)",
    )
    saved(tmp_path / "lacking")
    file = tmp_path / "lacking" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.layers.1.value.lora_A.weight"]
    save_file(tensors, file)
    refused(model, tmp_path / "lacking", "missing key 'base_model.model.layers.1.value.lora_A.weight'")
    refused(model, tmp_path / "nowhere", "model_id")
    refused(model, tmp_path / "first", "adapter_name: Adapter defualt does not exist: 'defualt'", name="defualt")
    refused(model, tmp_path / "first", "weird: expected no such argument", TypeError, weird=1)
    model.merge_adapter()
    refused(model, tmp_path / "first", "Cannot hot-swap adapter 'default' because it is currently merged into")
    with pytest.raises(TypeError, match="model: expected a PeftModel, got Toy"):
        hotswap_adapter(toy(), tmp_path / "first", "default")


def test_dora_with_fewer_modules_and_adapters_of_other_methods_are_refused(tmp_path):
    saved(tmp_path / "less", use_dora=True, target_modules=["query"])
    model = get_peft_model(toy(), lora(target_modules=BOTH, use_dora=True))
    refused(model, tmp_path / "less", "the file does not adapt .*'layers.0.value'.* DoRA's magnitudes")
    rotated = get_peft_model(toy(), oft())
    refused(rotated, tmp_path / "less", "adapter_name: 'default' is OFT; only LoRA adapters can be swapped")


@pytest.mark.parametrize("prepared", [False, True])
def test_an_interruption_leaves_the_model_as_it_was(prepared, tmp_path, monkeypatch):
    saved(tmp_path, r=6, lora_alpha=3, seed=2)
    model = get_peft_model(toy(), lora(target_modules=BOTH, r=4)).eval()
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    before, expected, config = snapshot(model), model(X), model.peft_config["default"]
    calls = []

    def interrupted(self, name, value):
        calls.append(value)
        if len(calls) == 4:
            raise KeyboardInterrupt
        plain(self, name, value)

    plain = peftk.nn.LoRALinear.write_scaling
    monkeypatch.setattr(peftk.nn.LoRALinear, "write_scaling", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hotswap_adapter(model, tmp_path, "default")
    monkeypatch.undo()
    assert_unchanged(model, before)
    assert torch.equal(model(X), expected)
    assert model.peft_config["default"] is config
    hotswap_adapter(model, tmp_path, "default")
    assert_close(model(X), PeftModel.from_pretrained(toy(), tmp_path)(X).double(), torch.float32)


def test_preparing_is_refused_by_name(tmp_path):
    model = saved(tmp_path, base=nets, target_modules=ALL, r=4)
    before = snapshot(model)
    for target, match in (
        (3, r"target_rank: Trying to pad .* original rank is larger \(4\): that of 'default'"),
        (0, "target_rank"),
    ):
        with pytest.raises(ValueError, match=match):
            prepare_model_for_compiled_hotswap(model, target_rank=target)
    with pytest.raises(ValueError, match="grouped', a convolution with groups=2, to target rank 5"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    with pytest.raises(TypeError, match="config: expected a LoraConfig, or a dict of them, got OFTConfig"):
        prepare_model_for_compiled_hotswap(model, target_rank=8, config=oft())
    with pytest.raises(ValueError, match="check_compiled: expected one of 'error', 'ignore', 'warn', got 'never'"):
        prepare_model_for_compiled_hotswap(model, check_compiled="never")
    with pytest.raises(ValueError, match="No adapter layers found on the model"):
        prepare_model_for_compiled_hotswap(get_peft_model(toy(), oft()), target_rank=8)
    assert_unchanged(model, before)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"\*before\* compiling the model"):
        prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(UserWarning, match="called with a model that is already compiled"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")
