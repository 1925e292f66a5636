"""`peftk.accelerate`: what it says, what it leaves as it was, how it is undone, and what it refuses."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import pickle
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import dora
from peft.tuners.lora import layer as lora_layer
from support.peft_layers import ADALORA_CONV, CONV, LINEAR, METHODS, Kinds, adapted, error, fill, inputs, step
from torch import nn

import peftk
from peftk.integrations import exchange
from peftk.integrations.hf_peft import library, tuner_layer

LIMIT = 1e-5


def test_what_is_no_model_of_peft_is_refused() -> None:
    with pytest.raises(TypeError, match=r"target: expected a torch\.nn\.Module .* got list"):
        peftk.accelerate([])
    with pytest.raises(ValueError, match=r"expected a model or one of 'peft', 'lycoris', 'adapters'; got 'pefft'"):
        peftk.accelerate("pefft")
    with pytest.raises(ValueError, match=r"layers of PEFT.*, got Linear without; call peft\.get_peft_model.* first"):
        peftk.accelerate(nn.Linear(2, 2))
    own = peftk.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peftk.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="peftk's own layers, which are fast already"):
        peftk.accelerate(own)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for target in ("peft", nn.Linear(2, 2)):
        with pytest.raises(ImportError, match="peft is not installed; run `pip install peft`"):
            peftk.accelerate(target)


def test_a_module_of_ones_own_with_the_name_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adapters", types.ModuleType("adapters"))
    assert peftk.accelerate(adapted("loha", 0, target_modules=LINEAR)).restore() == 2
    with pytest.raises(ImportError, match="adapters is not installed; run `pip install adapters`"):
        peftk.accelerate("adapters")


def test_peftk_alone_imports_no_peft() -> None:
    code = "import sys, peftk; assert not {'peft', 'transformers'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_report_says_what_runs_and_why_not() -> None:
    config = peft.LoraConfig(r=2, target_modules=[*LINEAR, "conv", "one"])
    base = Kinds()
    base.one = nn.MultiheadAttention(4, 1)
    model = peft.get_peft_model(base, config)
    model.base_model.model.second.lora_A["default"].register_forward_hook(lambda *_: None)
    report = peftk.accelerate(model)
    rows = {row.name.rpartition(".")[2]: row for row in report}
    assert rows["first"].accelerated and rows["first"].operator == "low_rank_linear"
    assert rows["first"].backend in ("native", "torch", "triton")
    assert not rows["second"].accelerated and "a hook" in str(rows["second"].reason)
    assert not rows["one"].accelerated and rows["one"].reason == "no arithmetic for this class"
    # The projection inside of an nn.MultiheadAttention has a layer of its own.
    assert report.accelerated == 3 and len(report) == 5
    text = str(report)
    assert text.startswith("PeftModel: 3 of 5 accelerated")
    for name in ("lora.Linear", "lora.Conv2d", "lora.MultiheadAttention", "library's own", "a hook or another forward"):
        assert name in text


def test_a_report_groups_layers_that_are_alike() -> None:
    model = peft.get_peft_model(
        nn.ModuleList(nn.Linear(8, 8) for _ in range(5)), peft.LoHaConfig(r=2, target_modules=r"\d")
    )
    lines = str(peftk.accelerate(model)).splitlines()
    assert len(lines) == 2 and "5  loha.Linear" in lines[1]
    assert "base_model.model.0, ... base_model.model.4" in lines[1]


def test_strict_changes_nothing() -> None:
    model = adapted("oft", 0, target_modules=["conv", "first"], coft=False)
    before = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match=r"strict: 1 of 2 cannot be accelerated, and nothing was changed; .*\.conv"):
        peftk.accelerate(model, strict=True)
    assert [type(m) for m in model.modules()] == before
    assert peftk.accelerate(adapted("oft", 0, target_modules=["first"], coft=False), strict=True).accelerated == 1


def test_twice_is_once_and_restoring_twice_too() -> None:
    model = adapted("loha", 0, target_modules=LINEAR)
    classes = [type(m) for m in model.modules()]
    first, second = peftk.accelerate(model), peftk.accelerate(model)
    assert list(first) == list(second)
    assert second.restore() == 2 and [type(m) for m in model.modules()] == classes
    assert second.restore() == first.restore() == 0
    assert peftk.accelerate(model).restore() == 2


def test_restoring_after_the_model_has_changed() -> None:
    model = adapted("lora", 3, target_modules=LINEAR)
    report = peftk.accelerate(model)
    layer = model.base_model.model.first
    base = model.unload()
    assert type(base.first) is nn.Linear
    del model, base
    assert report.restore() == 1 and type(layer) is lora_layer.Linear
    del layer
    assert report.restore() == 0


@pytest.mark.parametrize("method", METHODS)
def test_everything_but_the_arithmetic_is_that_of_peft(method: str, tmp_path: Path) -> None:
    """Names, values, files, copies, switching, merging."""
    plain, fast = adapted(method, 1), adapted(method, 1)
    args = inputs()
    peftk.accelerate(fast)
    assert repr(fast) == repr(plain)
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in plain.named_modules()]
    for a, b in zip(fast.modules(), plain.modules(), strict=True):
        own = exchange.original_class(a)
        assert own is type(b) and isinstance(a, own) and type(a).__qualname__ == own.__qualname__
        assert set(a.__dict__) == set(b.__dict__)
    fast.save_pretrained(tmp_path / "fast")
    plain.save_pretrained(tmp_path / "plain")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "fast" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    for model in (plain, fast):
        model.load_adapter(tmp_path / "plain", "loaded")
        fill(model, 5)
        model.eval()
    for change in (
        lambda m: m.set_adapter("loaded"),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.delete_adapter("default"),
        lambda m: m.load_adapter(tmp_path / "plain", "third"),
        lambda m: m.set_adapter("third"),
    ):
        for model in (plain, fast):
            change(model)
        assert error(fast(*args), plain(*args)) < LIMIT
        states = [{n: (p.requires_grad, p.shape) for n, p in model.named_parameters()} for model in (fast, plain)]
        assert states[0] == states[1]
    merged = [model.merge_and_unload() for model in (fast, plain)]
    for name, value in merged[0].state_dict().items():
        assert torch.equal(value, merged[1].state_dict()[name])


@pytest.mark.parametrize("method", METHODS)
def test_copies_keep_it_and_pickles_name_peft_alone(method: str) -> None:
    model, args = adapted(method, 2).eval(), inputs()
    expected = model(*args)
    count = peftk.accelerate(model).accelerated
    copied = copy.deepcopy(model)
    exchanged = [m for m in copied.modules() if type(m) is not exchange.original_class(m)]
    assert len(exchanged) >= count
    assert error(copied(*args), expected) < LIMIT
    text = pickle.dumps(model)
    assert b"peftk" not in text
    loaded = pickle.loads(text)
    assert all(type(m) is exchange.original_class(m) for m in loaded.modules())
    assert torch.equal(loaded(*args), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(*args), expected)


def test_batches_that_mix_adapters_are_peft_s() -> None:
    model = adapted("lora", 3, target_modules=["first"], use_dora=False).eval()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["first"]))
    fill(model, 1)
    x, names = inputs(), (["default", "other", "__base__"] * 32)
    expected = model(*x, adapter_names=names)
    peftk.accelerate(model)
    assert torch.equal(model(*x, adapter_names=names), expected)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(*x, adapter_names=["default"])


def test_who_listens_is_heard() -> None:
    model = adapted("lora", 3, target_modules=LINEAR, use_dora=False).eval()
    args, heard = inputs(), []
    expected = model(*args)
    peftk.accelerate(model)
    first, second = model.base_model.model.first, model.base_model.model.second
    first.lora_A["default"].register_forward_hook(lambda *_: heard.append("A"))
    first.base_layer.register_forward_hook(lambda *_: heard.append("base"))
    first.register_forward_hook(lambda *_: heard.append("layer"))
    second.base_layer.register_forward_pre_hook(lambda *_: heard.append("base of second"))
    assert error(model(*args), expected) < LIMIT
    assert sorted(heard) == ["A", "base", "base of second", "layer"]
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: heard.append(type(m).__name__))
    try:
        heard.clear()
        model(*args)
    finally:
        handle.remove()
    # PEFT's own way: A, B, the base and the layer, of both, and of what is around them.
    assert heard.count("Linear") == 8


def test_transforms_are_peft_s() -> None:
    model = adapted("lora", 3, target_modules=LINEAR, use_dora=False, lora_dropout=0.0).eval()
    args = inputs()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return model(args[0], x)

    def results() -> list[torch.Tensor]:
        x = args[1].detach()
        traced = torch.jit.trace(model, (args[0], x), check_trace=False)
        of_sum = torch.func.grad(lambda x: forward(x).sum())
        return [of_sum(x), torch.func.jvp(forward, (x,), (x,))[1], traced(args[0], x)]

    expected = results()
    peftk.accelerate(model)
    assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str) -> None:
    model, args = adapted(method, 1, target_modules=LINEAR).eval(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.base_model.model.first(args[1])
        peftk.accelerate(model)
        got = model.base_model.model.first(args[1])
    assert got.dtype == expected.dtype
    assert error(got, expected) < 2e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_compiled(method: str, training: bool) -> None:
    options = {name: 0.0 for name in ("rank_dropout", "module_dropout", "lora_dropout", "boft_dropout")}
    config = METHODS[method](random.Random(1))
    for name in [*options]:
        if not hasattr(config, name):
            del options[name]
    model, args = adapted(method, 1, target_modules=LINEAR, **options).train(training), inputs()
    expected = step(model, args)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(*args)
    report = peftk.accelerate(model)
    assert report.accelerated == (0 if getattr(config, "coft", False) else 2)
    for run in (compiled, torch.compile(model, backend="aot_eager")):
        got = step(run, args)
        assert error(got[0], expected[0]) < LIMIT
        for name, gradient in got[1].items():
            name = name.removeprefix("_orig_mod.")
            if method != "c3a" or "second" in name:
                assert error(gradient, expected[1][name]) < 10 * LIMIT, name


def test_hooks_of_offloading_before_and_after() -> None:
    accelerate = pytest.importorskip("accelerate")
    args = inputs()
    for first in (True, False):
        model = adapted("loha", 0, target_modules=LINEAR, rank_dropout=0.0, module_dropout=0.0).eval()
        expected = model(*args)
        layer = model.base_model.model.first
        if first:
            accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
        report = peftk.accelerate(model)
        assert report.accelerated == (1 if first else 2)
        if first:
            assert any("replaced `forward`" in str(row.reason) for row in report)
        else:
            accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
        assert error(model(*args), expected) < LIMIT
        report.restore()
        # The hook has kept our function, which goes PEFT's own way now.
        assert torch.equal(model(*args), expected)


def test_a_source_that_is_not_known_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = adapted("lora", 3, target_modules=["first"], use_dora=False).eval(), inputs()
    expected = model(*args)
    own = lora_layer.Linear.forward

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, x, *args, **kwargs)

    report = peftk.accelerate(model)
    assert report.accelerated == 1 and report.restore() == 1
    # Another library replaces the function, after the first look at it.
    monkeypatch.setattr(lora_layer.Linear, "forward", forward)
    report = peftk.accelerate(model)
    assert report.accelerated == 0
    reason = report[0].reason
    assert "peft.tuners.lora.layer.Linear.forward of peft" in reason and "is not one that was read" in reason
    assert "0.21.2" in reason
    report = peftk.accelerate("peft")
    assert report.accelerated < len(report)
    report.restore()
    assert lora_layer.Linear.forward is forward
    report = peftk.accelerate(model, force=True)
    assert report.accelerated == 1
    assert error(model(*args), expected) < LIMIT


def test_what_somebody_replaces_later_stays_his(monkeypatch: pytest.MonkeyPatch) -> None:
    report = peftk.accelerate("peft")
    mine = lora_layer.Linear.forward

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return mine(self, x, *args, **kwargs)

    monkeypatch.setattr(lora_layer.Linear, "forward", forward)
    assert report.restore() == len(report) - 1
    assert lora_layer.Linear.forward is forward
    monkeypatch.undo()
    # What he put back is ours; it is undone as if it had been asked for now.
    lora_layer.Linear.forward = mine._peftk_original
    assert peftk.accelerate("peft").restore() == len(report)


def test_dora_that_is_not_known_leaves_lora_accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(tuner_layer.FINGERPRINTS.known, "peft.tuners.lora.dora.DoraLinearLayer.forward")
    monkeypatch.setattr(tuner_layer.FINGERPRINTS, "_seen", {})
    for use_dora in (True, False):
        config = peft.LoraConfig(r=2, target_modules=["first"], use_dora=use_dora)
        assert peftk.accelerate(peft.get_peft_model(Kinds(), config)).accelerated == (not use_dora)


def test_what_a_call_asks_of_the_library_is_looked_up_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft.get_peft_model(Kinds(), peft.LoraConfig(r=2, target_modules=["first"], use_dora=True))
    peftk.accelerate(model, strict=True)
    model(*inputs())
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    model(*inputs())


def test_a_function_of_dora_that_is_replaced_later_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft.get_peft_model(Kinds(), peft.LoraConfig(r=2, target_modules=["first"], use_dora=True))
    peftk.accelerate(model, strict=True)
    calls = []
    theirs = dora.DoraLinearLayer.get_weight_norm

    def replaced(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return theirs(*args, **kwargs)

    model(*inputs())
    assert not calls
    monkeypatch.setattr(dora.DoraLinearLayer, "get_weight_norm", replaced)
    model(*inputs())
    assert calls


def test_subclasses_of_users_are_left_alone() -> None:
    class Mine(lora_layer.Linear):
        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(x, *args, **kwargs)

    config = peft.LoraConfig(r=2, target_modules=["first"])
    config._register_custom_module({nn.Linear: Mine})
    model = peft.get_peft_model(Kinds(), config)
    report = peftk.accelerate(model)
    assert report.accelerated == 0 and "not PEFT's" in str(report) and "Mine" in str(report)
    assert type(model.base_model.model.first) is Mine


def test_ways_are_complete() -> None:
    """Every class that has arithmetic says its method, its operator, and is fingerprinted."""
    for name, way in library.ways().items():
        assert way.method and way.operator
        for function in (f"{name}.forward", *way.copied, *way.copied_by_some):
            assert tuner_layer.FINGERPRINTS.known.get(function), f"{function}: run `python -m tools.fingerprints`"


def test_conv_of_linear_and_convolution_are_all_taken() -> None:
    for method in METHODS:
        conv = {"c3a": [], "oft": ["pointwise"], "adalora": ADALORA_CONV}.get(method, CONV)
        targets = LINEAR + conv
        options = {"coft": False} if method == "oft" else {"boft_dropout": 0.0} if method == "boft" else {}
        report = peftk.accelerate(adapted(method, 1, target_modules=targets, **options))
        assert report.accelerated == len(targets), report


def test_an_interruption_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("loha", 0, target_modules=LINEAR)
    for earlier in (False, True):
        if earlier:
            peftk.accelerate(model)
        classes = [type(m) for m in model.modules()]
        calls: list[int] = []

        def interrupted(layer: nn.Module, way: Any, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            exchange.exchange(layer, way)

        with monkeypatch.context() as patched:
            patched.setattr(library, "exchange", interrupted)
            with pytest.raises(KeyboardInterrupt):
                peftk.accelerate(model, correct=True)
        assert len(calls) == 2 and [type(m) for m in model.modules()] == classes
    before = {cls: dict(cls.__dict__) for _, cls in library.classes()}
    made, calls = exchange.wrapped, []

    def interrupted_class(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(*args)

    with monkeypatch.context() as patched:
        patched.setattr(importlib.import_module("peftk.integrations.accelerate"), "wrapped", interrupted_class)
        with pytest.raises(KeyboardInterrupt):
            peftk.accelerate("peft")
    assert len(calls) == 3 and {cls: dict(cls.__dict__) for cls in before} == before
