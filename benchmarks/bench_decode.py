"""Layers on few rows without gradients, as generating a token at a time runs them, beside their peers."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch

from benchmarks.arms import Arm, Budget, compare
from benchmarks.methods import METHODS, Cell, available
from benchmarks.peers import Bench

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16 = torch.float32, torch.bfloat16
ROWS = (1, 4, 16)
BUDGET = Budget(seconds=2.0, least=30, most=200, longest=10.0)


def _cells() -> list[Any]:
    return [
        pytest.param(
            Cell(name, method.size_for(features), features, rows, dtype, F32),
            id=f"{name}-{features}-{rows}-{str(dtype)[6:]}",
            marks=[] if features == 1024 and rows == 1 else [pytest.mark.full_run],
        )
        for rows in ROWS
        for features in (512, 1024)
        for dtype in (F32, BF16)
        for name, method in available().items()
    ]


def without_gradients(arm: Arm) -> Arm:
    """Return an arm that runs its forward pass alone and records nothing."""
    if arm.skip:
        return arm
    forward, check = arm.forward, arm.check
    assert forward is not None and check is not None

    def step() -> object:
        with torch.no_grad():
            return forward()

    # What the pass with gradients gives is held to float64; the output of this one is held to that.
    def errors() -> dict[str, float]:
        found = check()
        y, recorded = step(), forward()
        assert isinstance(y, torch.Tensor) and isinstance(recorded, torch.Tensor)
        apart = (y.double() - recorded.double()).norm() / recorded.double().norm()
        return {"output": found["output"] + apart.item()}

    return dataclasses.replace(arm, step=step, check=errors, owned=None, forward=None)


@pytest.mark.parametrize("cell", _cells())
def test_few_rows(cell: Cell, benchmark, budget: Budget) -> None:
    pytest.importorskip("peft")
    bench = Bench(cell, training=False)
    benchmark.group = f"decode {cell}"
    kind = "fp32" if cell.dtype is F32 else "bf16 base"
    info = {
        "suite": "decode",
        "cell": f"{METHODS[cell.method].title}, {cell.features}, {cell.tokens} rows, {kind}",
        "method": cell.method,
        "mode": "no gradients",
        "tokens": cell.tokens,
        "in_features": cell.features,
        "out_features": cell.features,
        "size": cell.size,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "parameters": "float32",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arms = [bench.peftk(), bench.frozen(), bench.hugging_face(), bench.hugging_face(accelerate=True)]
        compare(benchmark, [without_gradients(a) for a in arms], "frozen", info, BUDGET if budget.least > 3 else budget)
