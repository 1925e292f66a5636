"""Changes of several steps under faults: an exception at any line leaves the state of before or of after.

That is the state of the model, and that of the process: context variables, random numbers, modes and filters.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.toy_model import METHODS, X, toy
from torch import nn

import peftk
from peftk import PeftModel, get_peft_model
from peftk.nn.base.undo import all_or_nothing
from peftk.runtime import settings

ROOT = str(Path(peftk.__file__).parent)


def state(model: nn.Module) -> dict[str, object]:
    """Everything that a user could see of a model: modules, parameters, flags, adapters and outputs."""
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        kind = type(module)
        found[f"{path}:type"] = getattr(kind, "_public_class", kind).__name__
        for name in ("training", "disable_adapters", "active_adapters", "merged_adapters", "scaling", "r"):
            value = module.__dict__.get(name)
            found[f"{path}:{name}"] = value.copy() if isinstance(value, (list, dict)) else value
        found[f"{path}:hooks"] = len(module._forward_hooks), len(module._forward_pre_hooks)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name}:value"] = tensor.detach().clone()
        found[f"{name}:trained"] = tensor.requires_grad
    if isinstance(model, PeftModel):
        found["configs"] = {name: config.to_dict() for name, config in model.peft_config.items()}
        found["active"] = list(model.active_adapters)
    with torch.no_grad():
        mode = {m: m.training for m in model.modules()}
        found["output"] = model.eval()(X)
        for module, training in mode.items():
            module.training = training
    return found


def process() -> dict[str, object]:
    """What a change could leave behind in the process, outside of any model."""
    return {
        "context": dict(contextvars.copy_context()),
        "backend": settings.backend(),
        "random numbers": torch.get_rng_state(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autograd": (torch.is_anomaly_enabled(), torch._C._is_multithreading_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "filters": list(warnings.filters),
    }


def same(left: dict, right: dict) -> str | None:
    if left.keys() != right.keys():
        return f"keys {sorted(left.keys() ^ right.keys())[:4]}"
    for key, value in left.items():
        equal = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        if not equal:
            return f"{key}: {value} and {right[key]}"
    return None


class Fault(BaseException):
    """What no code of the package can expect."""


@contextlib.contextmanager
def fault_at(number: int, kind: type[BaseException], within: str = ROOT):
    """Raise at one of the lines of the package that a block runs, counted from 0; yield the number of lines seen."""
    seen = [0]

    def line(frame, event, argument):
        if event == "line":
            seen[0] += 1
            if seen[0] == number + 1:
                raise kind("injected")
        return line

    def call(frame, event, argument):
        return line if frame.f_code.co_filename.startswith(within) else None

    sys.settrace(call)
    try:
        yield seen
    finally:
        sys.settrace(None)


def config(name: str, trained: bool = True):
    found = copy.deepcopy(METHODS[name])
    # Only one AdaLoRA adapter of a model can be trained.
    found.inference_mode = name == "adalora" and not trained
    return found


def adapted(name: str) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(toy(), config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def with_two(name: str) -> PeftModel:
    model = adapted(name)
    model.add_adapter("other", config(name, trained=False))
    return model


def disabled(model: PeftModel, name: str, folder: Path) -> None:
    with model.disable_adapter():
        model(X)


def merged(name: str) -> PeftModel:
    model = adapted(name)
    model.merge_adapter()
    return model


CHANGES = {
    "wrap": (lambda name, folder: toy(), lambda model, name, folder: get_peft_model(model, config(name))),
    "add": (
        lambda name, folder: adapted(name),
        lambda model, name, folder: model.add_adapter("new", config(name, trained=False)),
    ),
    "set": (lambda name, folder: with_two(name), lambda model, name, folder: model.set_adapter("other")),
    "delete": (lambda name, folder: with_two(name), lambda model, name, folder: model.delete_adapter("default")),
    "load": (lambda name, folder: adapted(name), lambda model, name, folder: model.load_adapter(folder, "new")),
    "load over": (
        lambda name, folder: adapted(name),
        lambda model, name, folder: model.load_adapter(folder, "default"),
    ),
    "merge": (lambda name, folder: adapted(name), lambda model, name, folder: model.merge_adapter()),
    "merge for good": (lambda name, folder: adapted(name), lambda model, name, folder: model.merge_and_unload()),
    "unmerge": (lambda name, folder: merged(name), lambda model, name, folder: model.unmerge_adapter()),
    "unload": (lambda name, folder: adapted(name), lambda model, name, folder: model.unload()),
    "disable": (lambda name, folder: adapted(name), disabled),
    "disable what is merged": (lambda name, folder: merged(name), disabled),
    "save": (lambda name, folder: adapted(name), lambda model, name, folder: model.save_pretrained(folder / "copy")),
    "from file": (
        lambda name, folder: toy(),
        lambda model, name, folder: PeftModel.from_pretrained(model, folder),
    ),
}


MIXED = (
    lambda name, folder: with_two(name).eval(),
    lambda model, name, folder: model(X, adapter_names=["default", "other", "__base__"]),
)


def inject(change: str, name: str, folder: Path, points: int, within: str = ROOT) -> int:
    """Run a change with a fault at lines spread over it; return how many were tried."""
    make, act = MIXED if change == "mixed batch" else CHANGES[change]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = folder / "saved"
        if not saved.exists():
            other = adapted(name)
            with torch.no_grad():
                for parameter in other.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(2)
            other.save_pretrained(saved)
            for path in saved.glob("*"):
                assert path.is_file()
        torch.manual_seed(1)
        model = make(name, saved)
        torch.manual_seed(2)
        with fault_at(10**9, Fault, within) as seen:
            act(model, name, saved)
        after, total, tried = state(model), seen[0], 0
        for number in range(0, total, max(1, total // points)):
            torch.manual_seed(1)
            model = make(name, saved)
            before = state(model)
            kind = (Fault, KeyboardInterrupt, MemoryError)[tried % 3]
            torch.manual_seed(2)
            around = process()
            try:
                with fault_at(number, kind, within):
                    act(model, name, saved)
            except (Fault, KeyboardInterrupt, MemoryError):
                left, found = process(), state(model)
                if same(after, found) is None:
                    # On the lines that leave a change it is made already, and stays; it may have drawn numbers.
                    left["random numbers"] = around["random numbers"]
                    reason = same(around, left)
                else:
                    reason = same(around, left) or same(before, found)
                assert reason is None, f"{change}, {name}, line {number} of {total}: {reason}"
            tried += 1
    return tried


@pytest.mark.parametrize("change", CHANGES)
def test_a_fault_at_any_line_changes_nothing(change: str, tmp_path: Path) -> None:
    assert inject(change, "lora", tmp_path, 20) >= 20


def test_a_fault_at_any_line_of_a_mixed_batch_changes_nothing(tmp_path: Path) -> None:
    assert inject("mixed batch", "lora", tmp_path, 60) >= 60


READING = {
    "models/loading.py": ("load", "load over", "from file"),
    "models/mixed.py": ("mixed batch",),
    "nn/base/undo.py": ("disable", "disable what is merged", "mixed batch"),
}


@pytest.mark.parametrize("file", READING)
def test_every_line_that_puts_something_back_may_fail(file: str, tmp_path: Path) -> None:
    """All of them, and not some: what stands in a `finally` is one line among thousands."""
    for change in READING[file]:
        assert inject(change, "lora", tmp_path, 10**9, f"{ROOT}/{file}") >= 4


def chosen(model: nn.Module) -> None:
    with peftk.use_backend("torch"):
        model(X)
        with peftk.use_backend("auto"):
            model(X)


def test_a_fault_at_any_line_of_a_choice_leaves_no_choice() -> None:
    model = toy()
    with fault_at(10**9, Fault) as seen:
        chosen(model)
    assert seen[0] > 30
    for number in range(seen[0]):
        with pytest.raises(Fault), fault_at(number, Fault):
            chosen(model)
        assert settings.backend() == "auto"
    # What could not leave by itself is taken out when it is met.
    assert not settings.choice.open


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_fault_at_any_line_changes_nothing_of_any_method(change: str, name: str, tmp_path: Path) -> None:
    assert inject(change, name, tmp_path, 40) >= 40


def test_restoring_survives_a_second_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 2)
    calls = []
    from peftk.nn.base import undo

    restore = undo.Before.restore

    def interrupted(self) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        restore(self)

    monkeypatch.setattr(undo.Before, "restore", interrupted)
    with pytest.raises(ZeroDivisionError), all_or_nothing([layer], [layer.weight], [layer.bias]):
        layer.extra = 1
        layer.weight.requires_grad_(False)
        with torch.no_grad():
            layer.bias.fill_(7)
        1 / 0  # noqa: B018
    assert len(calls) == 2 and not hasattr(layer, "extra")
    assert layer.weight.requires_grad and (layer.bias != 7).all()
