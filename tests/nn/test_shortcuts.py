"""A layer runs few rows by a shortcut as long as nothing that it rests on has changed, and never longer."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import peftk
from peftk.testing.compare import assert_close, assert_same_bits

SIZE = 64
CONFIGS = {
    "lora": lambda: peftk.LoraConfig(r=5),
    "dora": lambda: peftk.LoraConfig(r=5, use_dora=True),
    "adalora": lambda: peftk.AdaLoraConfig(init_r=5, total_step=9),
    "c3a": lambda: peftk.C3AConfig(block_size=8),
    "loha": lambda: peftk.LoHaConfig(r=3),
    "lokr": lambda: peftk.LoKrConfig(r=99, decompose_factor=4),
    "oft": lambda: peftk.OFTConfig(oft_block_size=8, r=0),
    "oft-exact": lambda: peftk.OFTConfig(oft_block_size=8, r=0, use_cayley_neumann=False),
    "boft": lambda: peftk.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2),
}

pytest.importorskip("peftk.kernels.native.unchanged")


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> Callable[[], peftk.PeftConfig]:
    return request.param


def stirred(layer: nn.Module, seed: int = 7) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, p in layer.named_parameters():
        if not name.startswith("base_layer"):
            p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return layer


def made(config: Callable[[], peftk.PeftConfig]) -> nn.Module:
    torch.manual_seed(4)
    base = nn.Linear(SIZE, SIZE)
    return stirred(peftk.nn.layer_class_for(config(), base)(base, config()).eval())


def row() -> Tensor:
    return torch.randn(1, SIZE, generator=torch.Generator().manual_seed(3))


def truth(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer is, found by one that has never run a row."""
    with torch.no_grad():
        return copy.deepcopy(layer).double()(x.double())


@pytest.fixture
def layer(config: Callable[[], peftk.PeftConfig]) -> nn.Module:
    found = made(config)
    with torch.no_grad():
        found(row())
    assert found._shortcut is not None
    return found


def test_a_shortcut_is_taken_and_gives_what_the_layer_gives(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = row()
    expected = truth(layer, x)
    with torch.no_grad():
        again = layer(x)

        def never(*_: object) -> None:
            raise AssertionError("the long way")

        monkeypatch.setattr(type(layer), "_adapted", never)
        found = layer(x)
    assert_same_bits(found, again)
    assert_close(found, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 7, 16, 40, 63, 64])
def test_the_first_call_has_the_bits_of_those_that_follow(config: Callable, rows: int, dtype: torch.dtype) -> None:
    layer = made(config)
    layer.base_layer.to(dtype)
    x = torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(rows)).to(dtype)
    with torch.no_grad():
        first = layer(x)
        assert_close(first, truth(layer, x), dtype)
        for _ in range(2):
            assert_same_bits(layer(x), first)


def _replace_parameters(layer: nn.Module) -> None:
    for module in layer.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                setattr(module, name, nn.Parameter(p.detach() * 1.5, requires_grad=False))


def _replace_data(layer: nn.Module) -> None:
    for p in layer.parameters():
        p.data = p.data * 1.5


def _write_data(layer: nn.Module) -> None:
    for p in layer.parameters():
        p.data.mul_(1.5)


def _load_state(layer: nn.Module) -> None:
    layer.load_state_dict({name: t * 1.5 for name, t in layer.state_dict().items()})


def _scale(layer: nn.Module) -> None:
    if getattr(layer, "scaling", None):
        layer.scaling["default"] = 2.0 * layer.scaling["default"]


def _terms(layer: nn.Module) -> None:
    if isinstance(layer, peftk.nn.OFTLinear):
        layer.oft_R["default"].neumann_terms = 2


def _second(layer: nn.Module, config: Callable[[], peftk.PeftConfig]) -> None:
    layer.add_adapter("other", config())
    stirred(layer, 9)


def _other_base(layer: nn.Module) -> None:
    layer.base_layer = nn.Linear(SIZE, SIZE, bias=False)


CHANGES = {
    "parameters replaced": lambda layer, config: _replace_parameters(layer),
    "data replaced": lambda layer, config: _replace_data(layer),
    "data written": lambda layer, config: _write_data(layer),
    "a state loaded": lambda layer, config: _load_state(layer),
    "scaling": lambda layer, config: _scale(layer),
    "merged": lambda layer, config: layer.merge(),
    "merged and back": lambda layer, config: (layer.merge(), layer.unmerge()),
    "disabled": lambda layer, config: layer.enable_adapters(False),
    "disabled by hand": lambda layer, config: setattr(layer, "disable_adapters", True),
    "another is active": lambda layer, config: (_second(layer, config), layer.set_adapter("other")),
    "both are active": lambda layer, config: (_second(layer, config), layer.set_adapter(["default", "other"])),
    "both by hand": lambda layer, config: (_second(layer, config), layer.active_adapters.append("other")),
    "none by hand": lambda layer, config: layer.active_adapters.clear(),
    "deleted": lambda layer, config: layer.delete_adapter("default"),
    "another base layer": lambda layer, config: _other_base(layer),
    "terms of a series": lambda layer, config: _terms(layer),
    "no bias": lambda layer, config: setattr(layer.base_layer, "bias", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_has_changed_is_followed(layer: nn.Module, config: Callable, change: Callable) -> None:
    x = row()
    change(layer, config)
    with torch.no_grad():
        found = layer(x)
        again = layer(x)
    assert_close(found, truth(layer, x), torch.float32)
    assert_close(again, truth(layer, x), torch.float32)


def test_half_a_change_back_and_forth(layer: nn.Module) -> None:
    x = row()
    with torch.no_grad():
        before = layer(x)
        layer.enable_adapters(False)
        assert_same_bits(layer(x), layer.base_layer(x))
        layer.enable_adapters(True)
        assert_same_bits(layer(x), before)
        layer.train()
        assert layer(x).shape == x.shape
        layer.eval()
        assert_same_bits(layer(x), before)
    assert layer(x).requires_grad
    with torch.no_grad():
        assert_same_bits(layer(x), before)


def _modules(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules whose calls the arithmetic replaces, and what it does about those who listen."""
    found = {name: module for name, module in layer.named_modules() if name and module._parameters}
    # A container of bare parameters, and what is read and never called, are no calls to hear.
    return {name: m for name, m in found.items() if not isinstance(m, nn.ParameterDict) and "magnitude" not in name}


@pytest.mark.parametrize("listen", ["register_forward_hook", "register_forward_pre_hook", "forward", "everywhere"])
def test_who_listens_to_a_module_later_hears_it(layer: nn.Module, listen: str) -> None:
    x = row()
    if type(layer) is peftk.nn.LoRALinear and layer.use_dora["default"]:
        modules = {"base_layer": layer.base_layer}  # A hook on a factor of DoRA is refused.
    else:
        modules = _modules(layer)
    for name, module in modules.items():
        heard: list[object] = []
        if listen == "forward":
            own = module.forward
            module.forward = lambda *a, own=own, heard=heard: (heard.append(a), own(*a))[1]
        elif listen == "everywhere":
            handle = torch.nn.modules.module.register_module_forward_hook(
                lambda m, *_, module=module, heard=heard: heard.append(m) if m is module else None
            )
        else:
            handle = getattr(module, listen)(lambda *a, heard=heard: heard.append(a) and None)
        try:
            with torch.no_grad():
                layer(x)
                layer(x)
        finally:
            if listen == "forward":
                del module.forward
            else:
                handle.remove()
        assert len(heard) == 2, name


def test_a_hook_on_a_factor_of_dora_is_refused_later_too() -> None:
    layer = made(CONFIGS["dora"])
    with torch.no_grad():
        layer(row())
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
        with pytest.raises(NotImplementedError, match="a hook, a wrapper"):
            layer(row())


class _Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.heard += 1
        return func(*args, **(kwargs or {}))


class _Dispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard += "peftk_native" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Functions, _Dispatches])
def test_modes_of_torch_hear_the_operators(layer: nn.Module, mode: type) -> None:
    with torch.no_grad(), mode() as listening:
        layer(row())
    assert listening.heard > 0


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: peftk.use_backend("torch"),
        lambda: peftk.use_backend("auto"),
        torch.inference_mode,
        torch.enable_grad,
        torch.profiler.profile,
        torch.autograd.forward_ad.dual_level,
    ],
)
def test_what_is_around_a_call_is_followed(layer: nn.Module, around: Callable) -> None:
    x = row()
    fresh = copy.deepcopy(layer)
    with torch.no_grad(), around():
        found, expected = layer(x), fresh(x)
    assert found.dtype is expected.dtype and found.requires_grad == expected.requires_grad
    assert_close(found.detach(), expected.detach().double(), found.dtype)


def test_transforms_and_compilers_go_through_the_operators(layer: nn.Module) -> None:
    rows = torch.randn(3, 1, SIZE)
    torch.compiler.reset()  # One function may be compiled for so many layers.
    with torch.no_grad():
        expected = torch.stack([layer(x) for x in rows])
        with pytest.raises(RuntimeError, match="vmap support"):
            torch.func.vmap(layer)(rows)
        traced = torch.jit.trace(layer, rows[0])
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        for run in (traced, compiled):
            assert_close(torch.stack([run(x) for x in rows]), expected.double(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_is_no_few_rows_of_this_layer(layer: nn.Module, dtype: torch.dtype) -> None:
    x = row()
    layer.to(dtype)
    with torch.no_grad():
        found = layer(x.to(dtype))
    assert found.dtype is dtype
    assert_close(found, truth(layer, x.to(dtype)), dtype)


@pytest.mark.parametrize("shape", [(SIZE,), (0, SIZE), (2, 3, SIZE), (200, SIZE)])
def test_other_shapes(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        assert_close(layer(x), truth(layer, x), torch.float32)
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            layer(torch.randn(2, SIZE + 1))
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            layer(torch.tensor(1.0))


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_follows_its_own_changes(layer: nn.Module, how: Callable) -> None:
    x = row()
    with torch.no_grad():
        expected, frozen = layer(x), layer.base_layer(x)
        other = how(layer)
        assert_same_bits(other(x), expected)
        other.disable_adapters = True
        assert_same_bits(other(x), frozen)
        assert_same_bits(layer(x), expected)


def test_saving_a_whole_layer_saves_no_shortcut(layer: nn.Module) -> None:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)._shortcut is None


@contextlib.contextmanager
def no_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_layer_is_freed_at_once_and_so_is_what_it_no_longer_has(config: Callable) -> None:
    layer, x = made(config), row()
    with torch.no_grad(), no_collection():
        layer(x)
        old = weakref.ref(layer.base_layer.weight)
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight * 2, requires_grad=False)
        layer(x)
        assert old() is None
        (adapter, *_) = [weakref.ref(p) for name, p in layer.named_parameters() if "base_layer" not in name]
        layer.delete_adapter("default")
        assert adapter() is None
        layer.add_adapter("default", config())
        stirred(layer)
        layer.set_adapter("default", inference_mode=True)
        layer(x)
        assert layer._shortcut is not None
        gone = weakref.ref(layer)
        del layer
        assert gone() is None


def test_a_class_that_changes_the_arithmetic_has_none(config: Callable) -> None:
    base = nn.Linear(SIZE, SIZE)
    kind = peftk.nn.layer_class_for(config(), base)

    class Doubled(kind):
        def _adapted(self, x: Tensor, names: list[str], *args: object, **kwargs: object) -> Tensor:
            return 2 * super()._adapted(x, names, *args, **kwargs)

    layer, x = stirred(Doubled(base, config()).eval()), row()
    ordinary = stirred(kind(base, config()).eval())
    ordinary.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for _ in range(3):
            assert_close(layer(x), 2 * ordinary(x).double(), torch.float32)
    assert layer._shortcut is None


def test_unchanged_says_what_is_what_it_was() -> None:
    from peftk.kernels.native.unchanged import unchanged

    value, items = object(), ["a"]
    place = {"key": value}
    facts = ((lambda: 0,), ([], {}), (place, "key", value, place, "other", ..., None, "own", value))
    facts = (*facts[:2], (*facts[2], items, None, ("a",), value, None, object))
    assert unchanged({"own": value}, *facts)
    assert not unchanged({"own": 1}, *facts)
    assert not unchanged({}, *facts)
    items.append("b")
    assert not unchanged({"own": value}, *facts)
    items.pop()
    place["other"] = None
    assert not unchanged({"own": value}, *facts)
    del place["other"]
    assert unchanged({"own": value}, *facts)
    assert not unchanged({}, (lambda: 1,), (), ())
    assert not unchanged({}, (), ([1],), ())
    assert not unchanged({}, (), (), (value, None, int))
    with pytest.raises(ZeroDivisionError):
        unchanged({}, (lambda: 1 / 0,), (), ())
    for arguments in ((), ({}, (), ()), ({}, [], (), ()), (None, (), (), ())):
        with pytest.raises(TypeError, match="expected a dictionary and three tuples"):
            unchanged(*arguments)
