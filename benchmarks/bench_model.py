"""What operations on whole models cost: adapting, loading, choosing, merging and saving, beside PEFT's.

Layers are tiny, so that what is timed is the work for each of them and not that of its numbers. The same operation is
timed on models of 200, 800 and 3,200 layers: four times the layers may take four times as long, and no more.

Every step ends where it began, by the operation that undoes it, so that it can be repeated.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftk
from benchmarks.arms import Arm, Budget, compare

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (200, 800, 3200)
FEATURES, RANK = 8, 4
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
# The output of a model must be that of before, to the bit.
LIMIT = 0.0
FEW = Budget(seconds=10.0, least=11, most=40, slow=1.0, least_slow=5, longest=60.0)


class Block(nn.Module):
    """Four layers, named as those of an attention."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(FEATURES, FEATURES, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` and what the layers make of it."""
        return x + self.o_proj(self.v_proj(self.k_proj(self.q_proj(x)))) / 8


class Stack(nn.Module):
    """Many blocks.

    Args:
        layers: how many layers they have together, a multiple of four.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers // len(NAMES)))

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks."""
        for layer in self.layers:
            x = layer(x)
        return x


class Subject:
    """A model that one library has adapted, and the files of its adapter.

    Args:
        library: `peftk` or `peft`.
        layers: the number of layers.
        folder: where it may save.
        adapters: how many adapters the model has; the first one, `default`, is active.
        names: how many further entries `target_modules` and the patterns have.
    """

    def __init__(self, library: ModuleType, layers: int, folder: Path, adapters: int = 1, names: int = 0) -> None:
        self.library, self.layers, self.names = library, layers, names
        self.saved, self.copy = folder / "saved", folder / "copy"
        self.x = torch.linspace(-1, 1, 3 * FEATURES).reshape(3, FEATURES)
        torch.manual_seed(0)
        self.base = Stack(layers).eval()
        self.spare = Stack(layers).eval()
        self.model = self.library.get_peft_model(self.base, self.config())
        self.others = [f"other{number}" for number in range(adapters - 1)]
        for name in self.others:
            self.model.add_adapter(name, self.config())
        self.model.eval().save_pretrained(self.saved, selected_adapters=["default"])

    def config(self) -> Any:
        """Return a configuration for every layer; of the further names each is that of one layer."""
        whole = [f"layers.{i}.{name}" for i in range(self.layers // 4) for name in NAMES][: self.names]
        return self.library.LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=[*NAMES, *whole],
            rank_pattern=dict.fromkeys(whole, 2),
            alpha_pattern=dict.fromkeys(whole, 3),
        )

    def output(self) -> Tensor:
        """Run the model."""
        with torch.no_grad():
            return self.model(self.x)


def _wrap(s: Subject) -> None:
    s.library.get_peft_model(s.spare, s.config()).unload()


def _wrap_and_merge(s: Subject) -> None:
    s.library.get_peft_model(s.spare, s.config()).merge_and_unload()


def _from_file(s: Subject) -> None:
    s.library.PeftModel.from_pretrained(s.spare, s.saved).unload()


def _add(s: Subject) -> None:
    s.model.add_adapter("new", s.config())
    s.model.delete_adapter("new")


def _load(s: Subject) -> None:
    s.model.load_adapter(str(s.saved), "new")
    s.model.delete_adapter("new")


def _load_over(s: Subject) -> None:
    s.model.load_adapter(str(s.saved), "default")


def _choose(s: Subject) -> None:
    s.model.set_adapter("default")


def _switch_off(s: Subject) -> None:
    s.model.base_model.disable_adapter_layers()
    s.model.base_model.enable_adapter_layers()


def _block(s: Subject) -> None:
    with s.model.disable_adapter():
        pass


def _merge(s: Subject) -> None:
    s.model.merge_adapter()
    s.model.unmerge_adapter()


def _status(s: Subject) -> None:
    s.model.get_layer_status()
    s.model.get_model_status()


def _save(s: Subject) -> None:
    s.model.save_pretrained(s.copy, selected_adapters=["default"])


def _mixed(s: Subject) -> None:
    with torch.no_grad():
        s.model(s.x, adapter_names=["default", "__base__", "default"])


@dataclass(frozen=True)
class Operation:
    """What is timed.

    Attributes:
        title: for the report.
        step: the operation, and what undoes it.
    """

    title: str
    step: Callable[[Subject], None]


OPERATIONS = {
    "wrap": Operation("get_peft_model, unload", _wrap),
    "wrap-merge": Operation("get_peft_model, merge_and_unload", _wrap_and_merge),
    "from-file": Operation("from_pretrained, unload", _from_file),
    "add": Operation("add_adapter, delete_adapter", _add),
    "load": Operation("load_adapter, delete_adapter", _load),
    "load-over": Operation("load_adapter over an adapter", _load_over),
    "choose": Operation("set_adapter", _choose),
    "switch-off": Operation("disable_adapter_layers, enable_adapter_layers", _switch_off),
    "block": Operation("with disable_adapter()", _block),
    "merge": Operation("merge_adapter, unmerge_adapter", _merge),
    "status": Operation("get_layer_status, get_model_status", _status),
    "save": Operation("save_pretrained", _save),
    "mixed": Operation("a forward pass of a mixed batch", _mixed),
}


def arm(name: str, subject: Subject, step: Callable[[Subject], None], note: str) -> Arm:
    """Return an operation of one library; after it the model's output must be that of before, to the bit."""

    def check() -> dict[str, float]:
        before = subject.output()
        step(subject)
        return {"output": (subject.output() - before).abs().max().item()}

    return Arm(name, functools.partial(step, subject), check, LIMIT, note=note)


@pytest.mark.parametrize("layers", [SIZES[0], *(pytest.param(size, marks=pytest.mark.full_run) for size in SIZES[1:])])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(operation: str, layers: int, benchmark, budget: Budget, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    benchmark.group = f"model {operation}"
    info = {
        **{"suite": "model", "cell": f"{operation}-{layers}", "method": "lora", "mode": operation},
        **{"tokens": 3, "in_features": FEATURES, "out_features": FEATURES, "size": layers},
        **{"dtype": "float32", "parameters": "float32"},
    }
    step, title = OPERATIONS[operation].step, OPERATIONS[operation].title
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arms = [
            arm("peftk", Subject(peftk, layers, tmp_path / "peftk"), step, title),
            arm("hf", Subject(peft, layers, tmp_path / "hf"), step, title),
        ]
        compare(benchmark, arms, "hf", info, FEW if budget.least > 3 else budget)
