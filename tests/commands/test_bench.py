"""Benchmarks: interleaved timing, void rows, and the tuned table."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import peftk
from benchmarks import arms
from peftk.commands import bench
from peftk.runtime import registry, timings
from peftk.testing import memory
from peftk.testing.calls import KINDS, Call, operators, sweep
from peftk.testing.timing import Weave, paired_ratio

OPERATORS = [name for known in KINDS for name in operators(known)]
SMALL = {"tokens": (1, 5), "widths": ((24, 16),), "blocks": (4, 8), "ranks": (2,), "factors": (2, 4)}


def small_calls(operator: str, dtype: torch.dtype = torch.float32) -> list[Call]:
    return list(sweep(operator, dtype=dtype, **SMALL))


# -- timing -----------------------------------------------------------------------------------------------------------


def test_weave_times_every_arm_once_a_round_in_changing_order() -> None:
    order: list[str] = []
    weave = Weave({name: lambda name=name: order.append(name) for name in "abc"}, shortest=0.0)
    assert weave.calls == 1
    order.clear()
    samples = weave.run(20)
    rounds = ["".join(order[at : at + 3]) for at in range(0, 60, 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 2
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", 20)


def test_weave_repeats_quick_arms_within_a_sample() -> None:
    calls = []
    weave = Weave({"quick": lambda: calls.append(1)}, shortest=1e-3)
    assert weave.calls > 1
    calls.clear()
    weave.run(2)
    assert len(calls) == 2 * weave.calls
    assert weave.rounds_within(1e9, least=3, most=7) == 7
    assert weave.rounds_within(0.0, least=3, most=7) == 3


def test_ratios_are_taken_within_a_round() -> None:
    # The machine is ten times slower in the second half: the ratio of the totals would hide that a is twice b.
    b = [1.0] * 5 + [10.0] * 5
    assert paired_ratio([2 * t for t in b], b) == (2.0, 2.0, 2.0)
    assert paired_ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match=r"samples: expected as many as in reference.*got 1 and 2"):
        paired_ratio([1.0], [1.0, 2.0])


# -- the calls of the operators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_calls_are_right_on_every_backend(operator: str) -> None:
    assert operator in registry.OPERATORS
    for call in small_calls(operator):
        arguments = call.arguments()
        exact = call.truth(arguments)
        assert all(t.dtype is torch.float64 for t in exact)
        for backend in ("torch", "native"):
            if call.reason(backend, arguments) is None:
                assert call.error(call.bind(backend, arguments)(), exact) <= call.limit


def test_every_operator_can_be_timed() -> None:
    assert set(OPERATORS) == set(registry.OPERATORS)
    assert len({str(call) for operator in OPERATORS for call in sweep(operator)}) == sum(
        1 for operator in OPERATORS for _ in sweep(operator)
    )
    with pytest.raises(ValueError, match=r"operator: expected one of block_rotate, .*got 'rotate'"):
        next(sweep("rotate"))


# -- the tuned table --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PEFTK_CACHE_DIR", str(tmp_path))
    timings.clear()
    yield tmp_path
    monkeypatch.undo()
    timings.clear()


def test_a_tie_goes_to_the_backend_that_untuned_calls_prefer() -> None:
    assert list(timings._ranked({"torch": 10.0, "native": 10.9})) == ["native", "torch"]
    assert list(timings._ranked({"torch": 10.0, "native": 11.1})) == ["torch", "native"]
    assert list(timings._ranked({"triton": 30.0, "torch": 10.0, "native": 20.0})) == ["torch", "native", "triton"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_tuned_table_round_trip(operator: str, cache: Path) -> None:
    """What the command measures is what the registry looks up and obeys."""
    calls = small_calls(operator)
    measured = [bench.measure(call, "cpu", seconds=0.0, least=1, most=1) for call in calls]
    # Whatever the clock said: torch is to win, which no untuned operator prefers.
    for found in measured:
        assert set(found.errors) >= {"torch"}
        assert not any(reason.startswith("void") for reason in found.reasons.values())
        found.microseconds = {"native": 20.0, "torch": 10.0}
    name = timings.device_class("cpu")
    assert bench.write_table(cache / f"{name}.json", name, measured) == len(calls)
    for call in calls:
        arguments = call.arguments()
        bucket = registry.OPERATORS[operator].bucket
        assert timings.lookup(operator, arguments, bucket) == {"torch": 10.0, "native": 20.0}
        with peftk.use_backend("auto"):
            explanation = registry.OPERATORS[operator].explain(arguments)
        assert (explanation.chosen, explanation.why) == ("torch", "the fastest in the tuned table, or as good")


def test_a_clear_winner_takes_the_least_number_of_samples() -> None:
    call = small_calls("block_rotate")[0]
    assert bench.measure(call, "cpu", seconds=0.02, least=3, most=9, decided=1e-9).rounds == 3
    assert bench.measure(call, "cpu", seconds=10.0, least=3, most=9, decided=1e9).rounds == 9


def test_tuning_goes_on_where_it_stopped(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = small_calls("block_rotate")
    monkeypatch.setattr(bench, "choose_calls", lambda *args: iter(calls))
    asked = []

    def measure(call: Call, *args: object, **kwargs: object) -> bench.Measurement:
        asked.append(call)
        clock[0] += 40.0
        bucket = tuple(registry.OPERATORS[call.operator].bucket(*call.arguments()))
        return bench.Measurement(call, bucket, microseconds={"torch": 1.0}, rounds=1)

    clock = [0.0]
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench.time, "monotonic", lambda: clock[0])
    app = typer.Typer()
    app.command()(bench.bench)
    first = CliRunner().invoke(app, ["--operator", "block_rotate", "--tune", "--minutes", "1"])
    assert first.exit_code == 0, first.output
    assert asked == calls[:2] and f"{len(calls) - 2} of {len(calls)} calls are left" in first.output
    asked.clear()
    second = CliRunner().invoke(app, ["--operator", "block_rotate", "--tune", "--resume"])
    assert second.exit_code == 0, second.output
    assert asked == calls[2:] and "left" not in second.output
    path = cache / f"{timings.device_class('cpu')}.json"
    assert len(bench.cells_in(path)) == len(calls)
    refused = CliRunner().invoke(app, ["--resume"])
    assert refused.exit_code != 0 and "--tune" in refused.output


def _write(folder: Path, name: str, **times: float) -> tuple[registry.Operator, tuple[object, ...]]:
    """Write a table of one cell, and return the operator and arguments of a call in it."""
    call = small_calls("block_rotate")[0]
    operator, arguments = registry.OPERATORS[call.operator], call.arguments()
    bucket = list(operator.bucket(*arguments))
    folder.mkdir(exist_ok=True)
    row = {"dtype": "float32", "bucket": bucket, "microseconds": times}
    (folder / f"{name}.json").write_text(json.dumps({"operators": {"block_rotate": [row]}}))
    return operator, arguments


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        ("cpu-avx512", ["cpu-avx2", "cpu-default"], "cpu-avx2"),
        ("cpu-avx512", ["cpu-amx", "cpu-avx2"], "cpu-avx2"),
        ("cpu-default", ["cpu-amx", "cpu-avx512"], "cpu-avx512"),
        ("cuda-sm90", ["cuda-sm80", "cuda-sm100", "cpu-avx2"], "cuda-sm80"),
        ("cpu-avx2", ["cuda-sm90", "cpu-avx2", "notes"], None),
        ("mps", ["cpu-avx2"], None),
    ],
)
def test_a_class_takes_what_it_lacks_from_the_nearest_one(
    own: str, others: list[str], expected: str | None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timings, "SHIPPED", cache / "shipped")
    monkeypatch.setattr(timings, "device_class", lambda device_type, index=None: own)
    for name in others:
        if name != own:
            operator, arguments = _write(cache / "shipped", name, torch=10.0, native=20.0)
    timings.clear()
    assert timings.nearest(own) == expected
    found = operator.explain(arguments)
    why = f"the fastest in the tuned table of {expected}, the nearest class that has one, or as good"
    assert found.why == (why if expected else "untuned: the first that can run")
    if expected:
        assert found.chosen == "torch"
    # Its own cells, of the package or the user, come before.
    _write(cache, own, torch=10.0, native=20.0, triton=1.0)
    timings.clear()
    assert operator.explain(arguments).why == "the fastest in the tuned table, or as good"
    assert timings.lookup("block_rotate", arguments, operator.bucket) == {"triton": 1.0, "torch": 10.0, "native": 20.0}


def test_tuning_again_replaces_cells_and_keeps_the_others(cache: Path) -> None:
    path = cache / "cpu-test.json"
    first, second = (
        bench.Measurement(call, (at, 5, 2), microseconds={"torch": 1.0 + at})
        for at, call in enumerate(small_calls("block_rotate")[:2])
    )
    bench.write_table(path, "cpu-test", [first, second])
    second.microseconds = {"native": 0.5}
    bench.write_table(path, "cpu-test", [second, bench.Measurement(second.call, (9, 9, 9), reasons={"torch": "void"})])
    content = json.loads(path.read_text())
    assert content["device"] == "cpu-test"
    assert set(content["versions"]) == {"peftk", "torch", "python"}
    assert [(row["bucket"], row["microseconds"]) for row in content["operators"]["block_rotate"]] == [
        ([0, 5, 2], {"torch": 1.0}),
        ([1, 5, 2], {"native": 0.5}),
    ]
    assert not list(cache.glob(".*")), "the temporary file was renamed"


def test_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    call = small_calls("block_rotate")[0]
    kernel = registry.OPERATORS["block_rotate"].kernel("native")
    if isinstance(kernel, str):
        pytest.skip(kernel)
    wrong = (lambda x, blocks, transpose: kernel[0](x, blocks, not transpose)), kernel[1]
    monkeypatch.setitem(registry.OPERATORS["block_rotate"]._kernels, "native", wrong)
    found = bench.measure(call, "cpu", seconds=0.0, least=1, most=1)
    assert found.reasons["native"].startswith("void: error ")
    assert set(found.microseconds) == {"torch"}
    console = console_of(100)
    bench.show([found], console)
    assert "void" in console.file.getvalue()


def console_of(width: int) -> Any:
    from rich.console import Console

    return Console(file=io.StringIO(), width=width)


def test_calls_with_too_slow_a_product_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "product_rate", lambda device, dtype: 2e6 if dtype is torch.bfloat16 else 1e18)
    chosen = list(bench.choose_calls(["low_rank_linear", "cayley"], quick=True, device="cpu"))
    assert any(call.operator == "low_rank_linear" for call in chosen)
    assert all(call.dtype is torch.float32 for call in chosen)


# -- one comparison ---------------------------------------------------------------------------------------------------


class Benchmark:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target, setup, rounds: int, iterations: int) -> None:
        assert iterations == 1
        for _ in range(rounds):
            setup()
            target()
            self.stats.stats.data.append(1e-3)


INFO = {"suite": "layers", "cell": "lora-r16-1024", "mode": "forward+backward"}
ONCE = arms.Budget(seconds=0.0, least=4, most=4)


def arm(name: str, error: float = 1e-7, **kwargs: Any) -> arms.Arm:
    return arms.Arm(name, lambda: None, lambda: {"output": error, "dx": error / 2}, 1e-5, **kwargs)


def test_an_arm_above_its_limit_is_void_and_never_timed() -> None:
    timed = []

    def raises() -> dict[str, float]:
        raise RuntimeError("cannot run this\nsecond line")

    fixture = Benchmark()
    wrong = arms.Arm("wrong", lambda: timed.append("wrong"), lambda: {"output": 2e-5}, 1e-5)
    nan = arms.Arm("nan", lambda: timed.append("nan"), lambda: {"output": float("nan")}, 1e-5)
    broken = arms.Arm("broken", lambda: timed.append("broken"), raises, 1e-5)
    absent = arms.Arm("absent", skip="is not installed")
    arms.compare(fixture, [arm("peftk"), arm("frozen"), wrong, nan, broken, absent], "frozen", dict(INFO), ONCE)
    found = fixture.extra_info["arms"]
    assert not timed
    assert {name: entry["status"] for name, entry in found.items()} == {
        "peftk": "measured",
        "frozen": "measured",
        "wrong": "void",
        "nan": "void",
        "broken": "void",
        "absent": "skipped",
    }
    assert found["wrong"]["reason"] == "error against float64 above 1.0e-05: output 2.0e-05"
    assert found["broken"]["reason"] == "RuntimeError: cannot run this"
    assert "samples_us" not in found["wrong"]
    assert len(found["peftk"]["samples_us"]) == len(found["frozen"]["samples_us"]) == 4
    assert fixture.extra_info["rounds"] == 4


def test_a_void_arm_of_peftk_fails_after_it_is_recorded() -> None:
    fixture = Benchmark()
    with pytest.raises(AssertionError, match="peftk: error against float64 above"):
        arms.compare(fixture, [arm("peftk", error=1.0), arm("frozen")], "frozen", dict(INFO), ONCE)
    assert fixture.extra_info["arms"]["peftk"]["status"] == "void"
    assert fixture.extra_info["arms"]["frozen"]["ratio"] == 1.0


def test_backends_are_recorded_as_they_ran() -> None:
    x, blocks = torch.ones(2, 4), torch.eye(2).expand(2, 2, 2)
    select = registry.Operator.select
    with peftk.use_backend("torch"), arms.traced_backends() as found:
        peftk.functional.block_rotate(x, blocks)
    assert found == {"block_rotate": "torch"}
    assert registry.Operator.select is select


def test_saved_and_peak_bytes() -> None:
    x = torch.ones(64, 32, requires_grad=True)

    def step() -> None:
        # exp saves its result; multiplying by a number saves nothing.
        (x.exp() * 2.0).sum().backward()

    assert memory.saved_bytes(step, [x]) == x.numel() * 4
    assert memory.peak_bytes(step, [x]) >= 2 * x.numel() * 4
