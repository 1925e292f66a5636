"""How the cost of an adapter grows with rows, features, its size and the number of adapters, beside its operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import peftk
from benchmarks.arms import Arm, Budget, compare
from benchmarks.methods import METHODS, Cell, available
from benchmarks.peers import Bench

F32 = torch.float32
BUDGET = Budget(seconds=2.0, least=15, most=60, least_slow=5, longest=30.0)
ROWS, FEATURES = 512, 1024
AXES: dict[str, tuple[int, ...]] = {
    "rows": (256, 512, 1024, 2048),
    "features": (512, 1024, 2048, 4096),
    "size": (8, 16, 32, 64),
    "adapters": (1, 2, 4, 8),
}
"""What grows, and how far."""

SEVERAL = ("lora", "loha", "lokr", "oft", "c3a")
"""Methods of which several adapters act at once."""


def _cell(method: str, axis: str, value: int) -> Cell:
    features = value if axis == "features" else FEATURES
    size = value if axis == "size" else METHODS[method].size_for(FEATURES)
    return Cell(method, size, features, value if axis == "rows" else ROWS, F32, F32)


def _cells() -> list[Any]:
    return [
        pytest.param(
            *(method, axis, value),
            id=f"{method}-{axis}-{value}",
            marks=[] if (axis, value) in (("rows", 256), ("adapters", 2)) else [pytest.mark.full_run],
        )
        for method in available()
        for axis, values in AXES.items()
        for value in values
        if (axis != "adapters" or method in SEVERAL) and not (method == "xlora" and axis == "size")
    ]


def _several(bench: Bench, count: int) -> Arm:
    """Return the arm of a layer with as many adapters, all active; they start as the identity, which is computed."""
    method, cell = bench.method, bench.cell
    base = bench.linear()
    config = method.make_config(peftk, cell)
    layer: Any = peftk.nn.layer_class_for(config, base)(base, config, "0")
    for number in range(1, count):
        layer.attach(str(number), type(layer).make(base, method.make_config(peftk, cell)))
    layer.set_adapter([str(number) for number in range(count)])
    parameters = [p for p in layer.parameters() if p.requires_grad]
    if method.name == "c3a":
        # Whose start is not the identity.
        for parameter in parameters:
            parameter.data.zero_()
    x, grad = bench.x, bench.grad

    def step() -> torch.Tensor:
        for leaf in (x, *parameters):
            leaf.grad = None
        y: torch.Tensor = layer(x)
        y.backward(grad)
        return y

    def check() -> dict[str, float]:
        y = step().detach().double()
        expected = x.detach().double() @ base.weight.double().mT + base.bias.double()
        return {"output": ((y - expected).norm() / expected.norm()).item()}

    return Arm("peftk", step, check, 1e-5, lambda: [x, grad, *layer.parameters()], note=f"{count} adapters")


def _operations(step: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("method", "axis", "value"), _cells())
def test_growth(method: str, axis: str, value: int, benchmark, budget: Budget) -> None:
    cell = _cell(method, axis, value)
    bench = Bench(cell)
    benchmark.group = f"growth {method} {axis}"
    arms = [_several(bench, value) if axis == "adapters" else bench.peftk(), bench.frozen()]
    operations = _operations(arms[0].step) - _operations(arms[1].step)
    info = {
        "suite": "growth",
        "cell": f"{METHODS[method].title}, {axis} {value}",
        "method": method,
        "mode": axis,
        "value": value,
        "operations": operations,
        "tokens": cell.tokens,
        "in_features": cell.features,
        "out_features": cell.features,
        "size": cell.size,
        "dtype": "float32",
        "parameters": "float32",
    }
    compare(benchmark, arms, "frozen", info, BUDGET if budget.least > 3 else budget)
