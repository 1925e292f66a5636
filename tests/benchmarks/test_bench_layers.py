"""The benchmark of the layers on tiny ones: every method, every library, against float64, and what is kept."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import pytest
import torch

from benchmarks import arms
from benchmarks.methods import METHODS, NOT_TIMED, Cell, available
from benchmarks.peers import Bench
from peftk import PeftConfig
from peftk.testing.memory import saved_bytes

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"f32": (F32, F32), "bf16-f32adapter": (BF16, F32), "bf16": (BF16, BF16)}
PEERS = {"hf": "peft", "lycoris": "lycoris"}
FEATURES = 64


def bench_of(method: str, dtypes: str = "f32", out: int = 0, tokens: int = 24) -> Bench:
    size = METHODS[method].size_for(FEATURES)
    return Bench(Cell(method, size, FEATURES, tokens, *DTYPES[dtypes], out))


def inspected(arm: arms.Arm) -> arms.Arm:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arms.check(arm)
    return arm


def test_every_method_is_here() -> None:
    assert available() == METHODS
    kinds = {kind.__name__ for kind in PeftConfig._by_type.values()}
    assert {method.config for method in METHODS.values()} | NOT_TIMED.keys() == kinds
    assert all(NOT_TIMED.values())


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("method", available())
def test_our_layer_is_right(method: str, dtypes: str) -> None:
    for backend in (None, "torch"):
        arm = inspected(bench_of(method, dtypes, 96).peftk(backend))
        assert arm.found["status"] == "measured", arm.found["reason"]
        assert not arm.remark


@pytest.mark.parametrize("dtypes", ("f32", "bf16"))
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("method", METHODS)
def test_peers_are_right_or_say_why_not(method: str, peer: str, dtypes: str) -> None:
    pytest.importorskip(PEERS[peer])
    bench = bench_of(method, dtypes)
    arm = inspected(bench.hugging_face() if peer == "hf" else bench.lycoris())
    if peer == "lycoris" and METHODS[method].no_lycoris:
        assert arm.found == {"status": "skipped", "reason": METHODS[method].no_lycoris}
        return
    assert arm.found["status"] == "measured", arm.found["reason"]
    different = {"hf": {"boft", "c3a"}, "lycoris": {"boft", "dora", "oft-exact"}}[peer]
    assert bool(arm.remark) == (method in different)


@pytest.mark.parametrize("method", METHODS)
def test_plain_pytorch_is_the_same_mathematics(method: str) -> None:
    bench = bench_of(method, out=96)
    leaves = {name: value.clone().requires_grad_() for name, value in bench.values.items()}
    plain = functools.partial(bench.method.plain, bench.cell, weight=bench.base.weight, bias=bench.base.bias)
    arm = inspected(bench.arm("plain", lambda x: plain(x, **leaves), leaves))
    assert arm.found["status"] == "measured", arm.found["reason"]


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs PEFT")
def test_defects_of_peft_are_seen() -> None:
    """The truth of the cell voids the arms that are compared with what PEFT really computes."""
    for method, wrong in (("c3a", "dx"), ("boft", "output")):
        bench = bench_of(method)
        layer = bench.hugging_face()
        assert layer.remark.startswith("PEFT")
        layer.step()
        truth = bench.truth[wrong]
        found = bench.x.grad if wrong == "dx" else layer.step()
        assert ((found - truth).norm() / truth.norm()).item() > 1e-3


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("method", available())
def test_what_is_kept_for_the_backward_pass(method: str, dtypes: str) -> None:
    bench = bench_of(method, dtypes, tokens=512)
    arm = bench.peftk()
    assert saved_bytes(arm.step, arm.owned()) <= bench.method.kept_bytes(bench.cell)
