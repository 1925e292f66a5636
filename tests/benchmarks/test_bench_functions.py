"""The public operators as arms of a comparison, tiny: peftk's functions and plain PyTorch against dense formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import arms, bench_operators, bench_overhead
from benchmarks.functions import FORMULAS, FROZEN, Function, keywords
from benchmarks.plain import PLAIN
from peftk.testing.calls import KINDS, Call

CALLS = [Call(name, 6, 32, 32, 4, variant=variant) for name, kind in KINDS.items() for variant in kind.variants]


def test_every_operator_has_its_formulas_and_its_rows() -> None:
    assert set(PLAIN) == set(KINDS) <= set(FORMULAS)
    calls = list(bench_operators.function_calls())
    assert len({str(call) for call in calls}) == len(calls)
    for features in (1024, 4096):
        found = {(call.operator, call.variant) for call in calls if call.features == features}
        wanted = {(name, variant) for name, kind in KINDS.items() for variant in kind.variants}
        # What only the layer without a fused product calls is timed once.
        assert wanted - found == (set() if features == 1024 else {("circular_conv", "")})
    assert {call.dtype for call in calls} == {torch.float32}
    for test in (bench_overhead.test_forward, bench_overhead.test_forward_backward):
        (mark,) = [mark for mark in test.pytestmark if mark.args[0] == "operator"]
        assert mark.args[1] is KINDS


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_arms_are_right(call: Call) -> None:
    one = Function(call)
    tensors = {n for n, value in {**one.trained, **one.fixed}.items() if isinstance(value, Tensor)}
    assert not call.kind.differentiable or tensors - set(one.trained) <= set(FROZEN)
    assert set(one.truth) == {"output", *(f"d{name}" for name in one.trained)}
    backends = [name for name in ("torch", "native") if call.reason(name, one.raw) is None]
    for arm in (
        *(one.arm(name, one.public, "", name) for name in backends),
        one.arm("plain", one.plain, ""),
        one.forward_arm("forward", one.public, ""),
        one.forward_arm("plain-forward", one.plain, ""),
    ):
        arms.check(arm)
        assert arm.found["status"] == "measured", f"{arm.name}: {arm.found['reason']}"
        used = {name.removesuffix("_backward") for name in arm.found["backends"]}
        assert used == (set() if "plain" in arm.name else {call.operator})
    assert set(arm.found["errors"]) == {"output"}


@pytest.mark.parametrize("wrong", ("output", "gradient"))
def test_a_wrong_function_is_void(wrong: str) -> None:
    one = Function(CALLS[0])
    run = one.public if wrong == "gradient" else lambda **given: one.public(**given) * 1.001
    detach = {"gradient": lambda x, **given: run(0.999 * x + 0.001 * x.detach(), **given), "output": run}[wrong]
    arm = one.arm("peftk", detach, "")
    arms.check(arm)
    assert arm.found["status"] == "void"
    assert ("dx" in arm.found["reason"]) and ("output" in arm.found["reason"]) == (wrong == "output")


def test_keywords_are_those_of_the_public_function() -> None:
    def names(call: Call) -> dict[str, object]:
        given = keywords(call, call.arguments())
        return {n: value for n, value in given.items() if not isinstance(value, Tensor)}

    assert names(Call("cayley", 0, 32, 32, 4, variant="neumann")) == {"block_size": 4, "neumann_terms": 5}
    assert names(Call("cayley", 0, 32, 32, 4, variant="exact")) == {"block_size": 4}
    assert names(Call("low_rank_linear", 2, 8, 8, 4)) == {"scale": 2.0}
    assert names(Call("block_rotate", 2, 8, 8, 4)) == names(Call("scale_channels", 2, 8, 8, 4)) == {}
