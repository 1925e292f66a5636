"""What the dispatch costs: public functions on tiny tensors, beside their kernels and beside plain PyTorch.

What a call takes beyond its kernel is everything that peftk adds: checks, casts, the choice of a backend and, with
gradients, the autograd Function and torch's autograd engine. The arm of plain PyTorch is what a user would write
instead; what a call takes beyond that is what peftk costs him where tensors are tiny.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import peftk
from benchmarks.arms import Arm, Budget, compare
from benchmarks.functions import Function
from benchmarks.methods import Cell, available
from benchmarks.peers import Bench
from peftk.testing.calls import KINDS, Call, operators

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, FEATURES, SIZE = 2, 8, 4

# Many more samples than elsewhere: they are cheap, and a difference of microseconds is what is wanted.
CHEAP = Budget(seconds=2.0, least=50, most=400)


def _info(cell: str, method: str, mode: str, features: int = FEATURES) -> dict[str, Any]:
    return {
        "suite": "overhead",
        "cell": cell,
        "method": method,
        "mode": mode,
        "tokens": TOKENS,
        "in_features": features,
        "out_features": features,
        "size": SIZE,
        "dtype": "float32",
        "parameters": "float32",
    }


def _budget(budget: Budget) -> Budget:
    return CHEAP if budget.least > 3 else budget


@pytest.mark.parametrize("backend", ("torch", "native"))
@pytest.mark.parametrize("operator", KINDS)
def test_forward(operator: str, backend: str, benchmark, budget: Budget) -> None:
    call = Call(operator, TOKENS, FEATURES, FEATURES, SIZE)
    one = Function(call)
    if reason := call.reason(backend, one.raw):
        pytest.skip(f"not measured: {reason}")
    kernel, exact = call.bind(backend, one.raw), call.truth(one.raw)

    def check_kernel() -> dict[str, float]:
        return {"output": call.error(kernel(), exact)}

    note = f"the public function, backend {backend} named, no gradients"
    arms = [
        one.forward_arm("peftk", one.public, note),
        Arm("kernel", kernel, check_kernel, call.limit, note=f"the {backend} kernel called directly"),
        one.forward_arm("plain", one.plain, "plain PyTorch"),
    ]
    benchmark.group = f"overhead {operator} forward {backend}"
    info = _info(f"{operator}-forward-{backend}", operator, "forward")
    with torch.no_grad(), peftk.use_backend(backend):
        compare(benchmark, arms, "plain", info, _budget(budget))


@pytest.mark.parametrize("operator", KINDS)
def test_forward_backward(operator: str, benchmark, budget: Budget) -> None:
    calls = [Call(name, TOKENS, FEATURES, FEATURES, SIZE) for name in operators(operator)]
    raw = [call.arguments() for call in calls]
    kernels = [call.bind("torch", arguments) for call, arguments in zip(calls, raw, strict=True)]

    def both() -> None:
        for kernel in kernels:
            kernel()

    def check_both() -> dict[str, float]:
        triples = zip(calls, kernels, raw, strict=True)
        return {call.operator: call.error(kernel(), call.truth(arguments)) for call, kernel, arguments in triples}

    one = Function(calls[0])
    arms = [
        one.arm("peftk", one.public, "the public function, backend torch named, with gradients"),
        Arm("kernel", both, check_both, calls[0].limit, note="the two torch kernels called directly, no autograd"),
        one.arm("plain", one.plain, "plain PyTorch and its autograd"),
    ]
    benchmark.group = f"overhead {operator} forward+backward"
    info = _info(f"{operator}-forward+backward-torch", operator, "forward+backward")
    with peftk.use_backend("torch"):
        compare(benchmark, arms, "plain", info, _budget(budget))


@pytest.mark.parametrize("method", available())
def test_tiny_layer(method: str, benchmark, budget: Budget) -> None:
    """A whole layer on tensors so small that only Python and launches count."""
    cell = Cell(method, SIZE, 16, TOKENS, torch.float32, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arms = Bench(cell).arms({"compile": "left out: a compiled step has no dispatch to measure"})
        benchmark.group = f"overhead layer {method}"
        compare(benchmark, arms, "frozen", _info(f"layer-{method}", method, "forward+backward", 16), _budget(budget))
