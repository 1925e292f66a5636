"""LoRA on one stack of experts: beside the frozen product, a loop over the experts, and Hugging Face PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftk
from benchmarks.arms import Arm, Budget, compare
from peftk.methods.lora_parameter import GroupedProduct
from peftk.testing.cases import grouped_low_rank
from peftk.testing.compare import LIMITS

from . import truth

EXPERTS, OUT, IN, ROWS, RANK, SCALE = 16, 1024, 512, 2048, 16, 2.0
F = peftk.functional
# A step of PEFT's takes most of a second.
FEW = Budget(seconds=20.0, least=9, most=30, slow=2.0, least_slow=3, longest=60.0)


class Stack(nn.Module):
    """Experts as PEFT finds them: a stack of weights, and rows sorted by expert."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Multiply the rows of each expert by its weight."""
        return nn.functional.grouped_mm(x, self.weight.mT, offs=offsets.int())


class Setting:
    """The values that all arms share.

    Args:
        routing: "even", or "uneven": every expert has twice the rows of the next.
    """

    def __init__(self, routing: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, spread: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator) * spread

        even = [ROWS * (g + 1) // EXPERTS for g in range(EXPERTS)]
        uneven = [ROWS - ROWS // 2 ** (g + 1) for g in range(EXPERTS - 1)] + [ROWS]
        self.offsets = torch.tensor(even if routing == "even" else uneven)
        self.weight = normal(EXPERTS, OUT, IN, spread=IN**-0.5)
        self.values = {
            "x": normal(ROWS, IN),
            "a": normal(EXPERTS, RANK, IN, spread=IN**-0.5),
            "b": normal(EXPERTS, OUT, RANK, spread=0.1),
        }
        self.grad = normal(ROWS, OUT)

        def formula(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            bases = [rows @ w.mT.double() for rows, w in zip(x.split(self.sizes), self.weight, strict=True)]
            return grouped_low_rank.add(torch.cat(bases), x, a, b, self.offsets, SCALE)

        self.truth = truth.differentiate(formula, self.values, self.grad)

    @property
    def sizes(self) -> list[int]:
        """How many rows each expert has."""
        return torch.diff(self.offsets, prepend=torch.zeros(1, dtype=torch.int64)).tolist()

    def arm(self, name: str, forward: Callable[..., Tensor], note: str, adapted: bool = True) -> Arm:
        """Return an arm of a forward pass that takes x, a and b; of the frozen product alone, only x."""
        values = {n: v.clone().requires_grad_() for n, v in self.values.items() if adapted or n == "x"}

        def step() -> Tensor:
            for value in values.values():
                value.grad = None
            y = forward(**values)
            y.backward(self.grad)
            return y

        def check() -> dict[str, float]:
            y = step().detach()
            if not adapted:
                return {"output": 0.0}
            return truth.errors({"output": y, **{f"d{n}": v.grad for n, v in values.items()}}, self.truth)

        return Arm(name, step, check, LIMITS[torch.float32], lambda: [self.weight, *values.values()], note)

    def peftk(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Multiply by the frozen stack and add all adapters in one operator."""
        return F.grouped_low_rank_linear(x, self.weight, a, b, self.offsets, SCALE)

    def frozen(self, x: Tensor) -> Tensor:
        """Multiply by the frozen stack."""
        return GroupedProduct.apply(x, self.weight.mT, self.offsets)

    def loop(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Add one adapter after the other to the frozen product."""
        parts = zip(self.frozen(x).split(self.sizes), x.split(self.sizes), a, b, strict=True)
        return torch.cat([F.low_rank_add(base, rows, first, second, SCALE) for base, rows, first, second in parts])

    def hugging_face(self, peft: Any) -> Arm:
        """Return the arm of PEFT's wrapper around the stack."""
        config = peft.LoraConfig(
            r=RANK, lora_alpha=RANK * SCALE, target_modules=[], target_parameters=["experts.weight"]
        )
        holder = nn.Module()
        holder.experts = Stack(self.weight)
        wrapper = peft.get_peft_model(holder, config).base_model.model.experts
        first, second = wrapper.lora_A["default"], wrapper.lora_B["default"]
        # Its own parameters, whose gradients are those of the values.
        del first.weight, second.weight

        def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            first.weight, second.weight = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
            return wrapper(x, self.offsets)

        return self.arm("hf", forward, f"PEFT {peft.__version__}: W + dW, and a gradient of its size")


@pytest.mark.parametrize("routing", ["even", "uneven"])
def test_one_stack(routing: str, benchmark, budget: Budget) -> None:
    peft = pytest.importorskip("peft")
    setting = Setting(routing)
    benchmark.group = f"experts {routing}"
    info = {
        "suite": "experts",
        "cell": f"{EXPERTS} experts of {OUT} x {IN}, {ROWS} rows, {routing}, r {RANK}, fp32",
        "method": "lora",
        "mode": "forward+backward",
        "tokens": ROWS,
        "in_features": IN,
        "out_features": OUT,
        "size": RANK,
        "dtype": "float32",
        "parameters": "float32",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arms = [
            setting.arm("peftk", setting.peftk, "grouped_low_rank_linear"),
            setting.arm("frozen", setting.frozen, "the frozen product alone", adapted=False),
            setting.arm("loop", setting.loop, "the frozen product and low_rank_add for each expert"),
            setting.hugging_face(peft),
        ]
        compare(benchmark, arms, "frozen", info, FEW if budget.least > 3 else budget)
