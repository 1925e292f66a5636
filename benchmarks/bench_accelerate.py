"""PEFT's layers and models under `peftk.accelerate`, beside the same as PEFT has them, and peftk's own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from benchmarks import steps
from benchmarks.arms import Budget, compare
from benchmarks.methods import METHODS, Cell, available
from benchmarks.peers import Bench

F32, BF16 = torch.float32, torch.bfloat16
TOKENS, HIDDEN = 512, 1024
# A step takes a second and more, and differs from PEFT's by a few percent where most of it is the model's own.
FEW = Budget(seconds=90.0, least=35, most=50, slow=2.0, least_slow=7, longest=150.0)


@pytest.fixture(autouse=True)
def one_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every arm make BOFT's layers with one factor: PEFT has no more without its CUDA extension."""
    if "boft" in METHODS:
        monkeypatch.setattr(METHODS["boft"], "stages", 1)


def _cells() -> list[Any]:
    return [
        pytest.param(Cell(name, method.size_for(HIDDEN), HIDDEN, TOKENS, base, F32), id=f"{name}-{str(base)[6:]}")
        for base in (F32, BF16)
        for name, method in available().items()
    ]


def _info(cell: Cell, name: str, mode: str) -> dict[str, Any]:
    return {
        "suite": "accelerate",
        "cell": name,
        "method": cell.method,
        "mode": mode,
        "tokens": cell.tokens,
        "in_features": cell.features,
        "out_features": cell.features,
        "size": cell.size,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "parameters": str(cell.parameters).removeprefix("torch."),
    }


def _title(cell: Cell, what: str) -> str:
    return f"{METHODS[cell.method].title}, {what}, {'fp32' if cell.dtype is F32 else 'bf16 base'}"


@pytest.mark.parametrize("cell", _cells())
def test_layer(cell: Cell, benchmark, budget: Budget) -> None:
    pytest.importorskip("peft")
    bench = Bench(cell)
    benchmark.group = f"accelerate layer {cell}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arms = [bench.hugging_face(accelerate=True), bench.hugging_face(), bench.peftk()]
        compare(benchmark, arms, "hf", _info(cell, _title(cell, "layer"), "forward+backward"), budget)


@pytest.mark.full_run
@pytest.mark.parametrize("cell", _cells())
def test_step(cell: Cell, benchmark, budget: Budget) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    benchmark.group = f"accelerate step {cell}"
    shape = steps.llama(HIDDEN, 2816, TOKENS)
    chosen = {arm.name: arm for arm in steps.arms(shape, cell)}
    arms = [chosen[name] for name in ("accelerated", "hf", "peftk")]
    compare(benchmark, arms, "hf", _info(cell, _title(cell, "step"), "step"), FEW if budget.least > 3 else budget)
