"""Accelerated layers of PEFT run few rows by a shortcut that nothing outlives: what changes a layer is followed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk.integrations.exchange import original_class
from peftk.integrations.way import SHORTCUTS
from peftk.testing.compare import assert_close, assert_same_bits

peft = pytest.importorskip("peft")
pytest.importorskip("peftk.kernels.native.unchanged")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SIZE = 64
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=5, target_modules=["0"]),
    "dora": lambda: peft.LoraConfig(r=5, use_dora=True, target_modules=["0"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=5, total_step=9, target_modules=["0"]),
    "c3a": lambda: peft.C3AConfig(block_size=8, target_modules=["0"]),
    "loha": lambda: peft.LoHaConfig(r=3, target_modules=["0"]),
    "lokr": lambda: peft.LoKrConfig(r=99, decompose_factor=4, target_modules=["0"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, r=0, use_cayley_neumann=True, target_modules=["0"]),
    "oft-exact": lambda: peft.OFTConfig(oft_block_size=8, r=0, use_cayley_neumann=False, target_modules=["0"]),
    "boft": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["0"]),
}


def stirred(layer: nn.Module, seed: int = 7) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, p in layer.named_parameters():
        if "base_layer" not in name and "ranknum" not in name:
            p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return layer


def made(config: Callable) -> nn.Module:
    torch.manual_seed(4)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE)), config()).eval()
    return stirred(model)


def row() -> Tensor:
    return torch.randn(1, SIZE, generator=torch.Generator().manual_seed(3))


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model[0]


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    """What PEFT's own code makes of the layer as it is now."""
    other = copy.deepcopy(layer)
    other.__class__ = original_class(layer)
    with torch.no_grad():
        return other(x)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> Callable:
    return request.param


@pytest.fixture
def model(config: Callable) -> nn.Module:
    found = made(config)
    peftk.accelerate(found, strict=True)
    with torch.no_grad():
        found(row())
    assert layer_of(found) in SHORTCUTS
    return found


def _replace_parameters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for key, p in list(module._parameters.items()):
            if p is not None and "ranknum" not in f"{name}.{key}":
                setattr(module, key, nn.Parameter(p.detach() * 1.5, requires_grad=False))


def _data(model: nn.Module, write: bool) -> None:
    for name, p in model.named_parameters():
        if write:
            p.data.mul_(1.5)
        elif "ranknum" not in name:
            p.data = p.data * 1.5


def _scale(model: nn.Module) -> None:
    layer = layer_of(model)
    if getattr(layer, "scaling", None):
        layer.scaling["default"] = 2.0 * layer.scaling["default"]


def _second(model: nn.Module, config: Callable) -> None:
    if isinstance(config(), peft.AdaLoraConfig):
        pytest.skip("PEFT's AdaLoRA trains one adapter")
    model.add_adapter("other", config())
    stirred(model.eval(), 9)


CHANGES = {
    "parameters replaced": lambda model, config: _replace_parameters(model),
    "data replaced": lambda model, config: _data(model, write=False),
    "data written": lambda model, config: _data(model, write=True),
    "scaling": lambda model, config: _scale(model),
    "merged": lambda model, config: layer_of(model).merge(),
    "merged and back": lambda model, config: (layer_of(model).merge(), layer_of(model).unmerge()),
    "disabled": lambda model, config: layer_of(model).enable_adapters(False),
    "another is active": lambda model, config: (_second(model, config), model.set_adapter("other")),
    "deleted": lambda model, config: (
        _second(model, config),
        model.set_adapter("other"),
        model.delete_adapter("default"),
    ),
    "no bias": lambda model, config: setattr(layer_of(model).base_layer, "bias", None),
    "another base layer": lambda model, config: setattr(layer_of(model), "base_layer", nn.Linear(SIZE, SIZE)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_has_changed_is_followed(model: nn.Module, config: Callable, change: Callable) -> None:
    x, layer = row(), layer_of(model)
    with torch.no_grad():
        assert_close(layer(x), plain(layer, x).double(), torch.float32)
        change(model, config)
        for _ in range(2):
            assert_close(layer(x), plain(layer, x).double(), torch.float32)


def test_a_shortcut_asks_for_no_adapters(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x, layer = row(), layer_of(model)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr(type(layer), "active_adapters", property(lambda _: pytest.fail("the long way")))
        assert_same_bits(layer(x), expected)


@pytest.mark.parametrize("how", ["register_forward_hook", "register_forward_pre_hook"])
def test_who_listens_later_is_heard(model: nn.Module, how: str) -> None:
    x, layer = row(), layer_of(model)
    for name, module in layer.named_modules():
        if not name or not module._parameters or isinstance(module, nn.ParameterDict) or "magnitude" in name:
            continue
        before: list[object] = []
        handle = getattr(module, how)(lambda *a, heard=before: heard.append(a) and None)
        plain(layer, x)
        expected = len(before)
        with torch.no_grad():
            layer(x)
        handle.remove()
        assert len(before) == 2 * expected, name


def test_training_and_back(model: nn.Module) -> None:
    x = row()
    with torch.no_grad():
        before = model(x)
        model.train()
        model(x)
        model.eval()
        assert_close(model(x), before.double(), torch.float32)
    assert model(x).requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = model(x), plain(layer_of(model), x)
    assert found.dtype is expected.dtype
    assert_close(found, expected.double(), torch.bfloat16)


def test_restoring_and_copying_leave_nothing_behind(config: Callable) -> None:
    model = made(config)
    keys = [*layer_of(model).__dict__]
    report = peftk.accelerate(model)
    with torch.no_grad():
        model(row())
    assert layer_of(model) in SHORTCUTS
    assert [*layer_of(model).__dict__] == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert layer_of(other) not in SHORTCUTS
        with torch.no_grad():
            assert_close(other(row()), model(row()).double(), torch.float32)
    report.restore()
    assert layer_of(model) not in SHORTCUTS
    layer = weakref.ref(layer_of(model))
    del model
    gc.collect()
    assert layer() is None


def test_a_layer_that_is_gone_has_no_shortcut(config: Callable) -> None:
    model = made(config)
    peftk.accelerate(model)
    with torch.no_grad():
        model(row())
    count, layer = len(SHORTCUTS), weakref.ref(layer_of(model))
    del model
    gc.collect()
    assert layer() is None and len(SHORTCUTS) == count - 1


def test_compilers_go_through_the_operators(model: nn.Module) -> None:
    x, layer = row(), layer_of(model)
    torch.compiler.reset()
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, backend="eager")
        assert_close(compiled(x), expected.double(), torch.float32)


def test_the_rank_of_adalora_may_be_written_to() -> None:
    model = made(CONFIGS["adalora"])
    peftk.accelerate(model)
    x, layer = row(), layer_of(model)
    with torch.no_grad():
        layer(x)
        layer.ranknum["default"].fill_(2.0)
        assert_close(layer(x), plain(layer, x).double(), torch.float32)


def test_dora_of_one_dimension_is_left_to_peft() -> None:
    model = made(CONFIGS["dora"])
    peftk.accelerate(model)
    layer, x = layer_of(model), row()
    with torch.no_grad():
        layer(x)
        assert layer(x[0]).shape == plain(layer, x[0]).shape
