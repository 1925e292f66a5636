"""Layers, forward and backward, as a multiple of the frozen layer, beside their peers."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from benchmarks.arms import Budget, compare
from benchmarks.methods import METHODS, Cell, available
from benchmarks.peers import Bench
from peftk.testing.timing import Weave

F32, BF16 = torch.float32, torch.bfloat16
TOKENS = 512

# The headline of the report gets more samples than the least.
SECONDS = 12.0

# Seconds that one step of a peer may take, by a rough estimate.
LONGEST_PEER = 60.0

# Seconds for one product on this device above which a cell cannot be sampled often enough to mean anything.
LONGEST_PRODUCT = 5.0


def _cells() -> list:
    cells = []
    for dtypes in (((F32, F32),), ((BF16, F32), (BF16, BF16))):
        for features in (1024, 4096):
            for name, method in available().items():
                size = method.size_for(features)
                cells += [Cell(name, size, features, TOKENS, base, adapter) for base, adapter in dtypes]
    return [pytest.param(c, id=str(c), marks=[pytest.mark.full_run] if c.features > 1024 else []) for c in cells]


def seconds_of_product(cell: Cell) -> float:
    """Estimate how long ``grad @ weight`` takes, from a sixteenth of it or less; half precision may lack hardware."""
    if cell.dtype is F32:
        return 0.0
    size = min(cell.features, 1024)
    rows = max(1, cell.tokens * 1024**2 // (16 * size**2))
    grad, weight = torch.ones(rows, size, dtype=cell.dtype), torch.ones(size, size, dtype=cell.dtype)
    weave = Weave({"product": lambda: grad @ weight})
    return min(weave.run(5)["product"]) * cell.tokens * cell.features**2 / (rows * size**2)


@pytest.mark.parametrize("cell", _cells())
def test_layer(cell: Cell, benchmark, budget: Budget, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--bench-quick"):
        cell = dataclasses.replace(cell, tokens=64, features=256, size=METHODS[cell.method].size_for(256))
    seconds = seconds_of_product(cell)
    if seconds > LONGEST_PRODUCT:
        pytest.skip(
            f"not measured on this device: one {cell.tokens} x {cell.features} x {cell.features} product in "
            f"{cell.dtype} takes about {seconds:.0f} s (no hardware for it)"
        )
    slow = f"left out: every sample takes {2 * seconds:.1f} s or more here, in the same slow products as the other arms"
    leave_out = {"compile": slow, "peftk-torch": slow} if seconds > 0.5 else {}
    step = seconds * METHODS[cell.method].peft_work(cell)
    if step > LONGEST_PEER:
        leave_out["hf"] = f"left out: one step takes about {step:.0f} s here, in products of matrices of its own"
    benchmark.group = f"layer {cell}"
    info = {
        "suite": "layers",
        "cell": str(cell),
        "method": cell.method,
        "mode": "forward+backward",
        "tokens": cell.tokens,
        "in_features": cell.features,
        "out_features": cell.features,
        "size": cell.size,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "parameters": str(cell.parameters).removeprefix("torch."),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arms = Bench(cell).arms(leave_out)
        if not request.config.getoption("--bench-quick"):
            budget = dataclasses.replace(budget, seconds=SECONDS)
        compare(benchmark, arms, "frozen", info, budget)
