"""Which backend an operator chooses, on operators and tensors that are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from peftk.runtime import settings, timings
from peftk.runtime.registry import Operator


def made_up(able: tuple[str, ...], **settled: tuple[str, ...]) -> tuple[Operator, dict]:
    functions = {name: lambda *args: None for name in settings.BACKENDS}
    operator = Operator("made_up", "nothing", lambda *args: (), **settled)
    for name, function in functions.items():
        operator._kernels[name] = (function, None if name in able else lambda *args: "it cannot")
    return operator, functions


@pytest.mark.parametrize(
    ("able", "cpu", "gpu"),
    [
        (("native", "triton", "torch"), "native", "triton"),
        (("native", "torch"), "native", "native"),
        (("torch",), "torch", "torch"),
    ],
)
def test_an_operator_may_prefer_another_order_on_gpus(able, cpu, gpu, monkeypatch) -> None:
    monkeypatch.setattr(timings, "cells_of", lambda *_: None)
    operator, functions = made_up(able, on_gpus=("triton", "native", "torch"))
    usual, usual_functions = made_up(able)
    for is_cuda, expected in ((False, cpu), (True, gpu)):
        args = (SimpleNamespace(is_cuda=is_cuda, device=None),)
        assert operator.select(args) is functions[expected]
        assert operator.explain(args).chosen == expected
        assert usual.select(args) is usual_functions[cpu]


def test_measured_times_decide_before_the_order(monkeypatch) -> None:
    monkeypatch.setattr(timings, "cells_of", lambda *_: {"cell": {"native": 1.0, "triton": 2.0}})
    monkeypatch.setattr(timings, "cell", lambda *_: "cell")
    operator, functions = made_up(("native", "triton", "torch"), on_gpus=("triton", "native", "torch"))
    assert operator.select((SimpleNamespace(is_cuda=True, device=None),)) is functions["native"]
