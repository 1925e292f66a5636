"""Operators: the kernels of every backend beside each other, and the public functions beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.arms import Arm, Budget, compare
from benchmarks.functions import Function
from benchmarks.peers import why_no_compiler
from peftk.testing.calls import KINDS, Call, operators, sweep

TOKENS = 512

# One is enough to try it.
COMPILED_WHEN_QUICK = ("scale_channels",)


def calls() -> Iterator[Call]:
    """Yield forward and backward operators on the shapes of attention projections, small and large."""
    for features in (1024, 4096):
        for name, kind in KINDS.items():
            if features not in kind.timed.widths:
                continue
            shape: dict[str, Any] = {"tokens": (TOKENS,), "widths": ((features, features),)}
            shape[f"{kind.size}s"] = kind.timed.sizes(features)
            for operator in operators(name):
                for dtype in kind.timed.dtypes:
                    yield from sweep(operator, dtype=dtype, **shape)


def function_calls() -> Iterator[Call]:
    """Yield the calls of the public functions: of every operator and variant, the first size at each width."""
    seen = set()
    for call in calls():
        key = call.operator, call.variant, call.features
        if not call.backward and key not in seen:
            seen.add(key)
            yield call


def _params(chosen: Iterator[Call]) -> list:
    return [
        pytest.param(call, id=str(call), marks=[pytest.mark.full_run] if call.features > 1024 else [])
        for call in chosen
    ]


def _info(suite: str, call: Call, mode: str) -> dict[str, Any]:
    return {
        "suite": suite,
        "cell": str(call),
        "method": call.operator,
        "mode": mode,
        "tokens": call.tokens,
        "in_features": call.features,
        "out_features": call.out,
        "size": call.size,
        "dtype": str(call.dtype).removeprefix("torch."),
        "parameters": "float32",
    }


@pytest.mark.parametrize("call", _params(calls()))
def test_kernel(call: Call, benchmark, budget: Budget) -> None:
    arguments = call.arguments()
    exact = call.truth(arguments)
    arms = []
    for backend in ("native", "torch"):
        if reason := call.reason(backend, arguments):
            arms.append(Arm(backend, skip=reason))
            continue
        step = call.bind(backend, arguments)

        def check(step: Callable[[], Any] = step) -> dict[str, float]:
            return {"result": call.error(step(), exact)}

        arms.append(Arm(backend, step, check, call.limit, note=f"the {backend} kernel itself, without the registry"))
    # Where C++ refuses a call, torch is what peftk runs: the row then says so.
    arms.sort(key=lambda arm: arm.skip is not None)
    benchmark.group = f"kernel {call}"
    info = _info("kernels", call, "backward" if call.backward else "forward")
    with torch.no_grad():
        compare(benchmark, arms, "torch", info, budget)


@pytest.mark.parametrize("call", _params(function_calls()))
def test_function(call: Call, benchmark, budget: Budget, request: pytest.FixtureRequest) -> None:
    one = Function(call)
    arms = []
    for backend in ("native", "torch"):
        if reason := call.reason(backend, one.raw):
            arms.append(Arm(backend, skip=reason))
        else:
            arms.append(one.arm(backend, one.public, f"peftk.functional on backend {backend}", backend))
    arms.append(one.arm("eager", one.plain, "plain PyTorch and its autograd"))
    reason = why_no_compiler()
    if reason is None and request.config.getoption("--bench-quick") and call.operator not in COMPILED_WHEN_QUICK:
        reason = "left out of a quick run: compiling takes longer than everything else"
    if reason:
        arms.append(Arm("compile", skip=reason))
    else:
        torch._dynamo.reset()
        graph = torch.compile(one.plain, fullgraph=True, dynamic=False)
        arms.append(one.arm("compile", graph, "the same, torch.compile (inductor)"))
    arms.sort(key=lambda arm: arm.skip is not None)
    benchmark.group = f"function {call}"
    mode = "forward+backward" if call.kind.differentiable else "forward"
    compare(benchmark, arms, "eager", _info("functions", call, mode), budget)
