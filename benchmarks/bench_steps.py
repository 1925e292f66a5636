"""Whole training steps of small models of several shapes: frozen, this package, PEFT, PEFT accelerated, LyCORIS."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import steps
from benchmarks.arms import Budget, compare
from benchmarks.methods import METHODS, Cell, available

F32, BF16 = torch.float32, torch.bfloat16
FEW = Budget(seconds=9.0, least=9, most=30, slow=2.0, least_slow=5, longest=40.0)
# The LLaMA of 1024 features stands in the suite of accelerated models.
SHAPES = {"llama": steps.llama(512, 1408, 512), "vit": steps.vit(), "unet": steps.unet_block()}


def _cells() -> list[Any]:
    return [
        pytest.param(
            shape,
            Cell(name, method.size_for(SHAPES[shape].hidden), SHAPES[shape].hidden, 0, dtype, F32),
            marks=[] if dtype is F32 and name in ("lora", "loha") else [pytest.mark.full_run],
        )
        for dtype in (F32, BF16)
        for shape in SHAPES
        for name, method in available().items()
        if (shape, name) not in WITHOUT
    ]


WITHOUT = {("unet", "xlora"), ("vit", "xlora"), ("llama", "xlora"), ("unet", "boft")}
"""X-LoRA mixes adapters that must be trained before; the widths of the block have no common butterfly."""


def _id(value: Any) -> str:
    return f"{value.method}-{str(value.dtype)[6:]}" if isinstance(value, Cell) else str(value)


@pytest.mark.parametrize(("shape", "cell"), _cells(), ids=_id)
def test_step(shape: str, cell: Cell, benchmark, budget: Budget) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    if shape == "unet":
        pytest.importorskip("diffusers")
    chosen = SHAPES[shape]
    benchmark.group = f"step {shape} {cell}"
    info = {
        "suite": "steps",
        "cell": f"{METHODS[cell.method].title}, {chosen.name}, {'fp32' if cell.dtype is F32 else 'bf16 base'}",
        "method": cell.method,
        "mode": "step",
        "tokens": chosen.tokens,
        "in_features": chosen.hidden,
        "out_features": chosen.hidden,
        "size": cell.size,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "parameters": "float32",
    }
    # Compiling takes a minute for each model.
    compiled = shape == "llama" and cell.dtype is F32 and cell.method in ("lora", "oft", "boft", "loha")
    compare(benchmark, steps.arms(chosen, cell, compiled=compiled), "hf", info, FEW if budget.least > 3 else budget)
