"""Benchmarks: interleaved timing, void rows, the report from a small synthetic run, and the tuned table."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import peftk
from benchmarks import arms, results, tables
from peftk import _registry, _tuning
from peftk.commands import bench
from peftk.testing.calls import FAMILIES, Call, sweep
from peftk.testing.timing import Weave, paired_ratio

OPERATORS = [name for family in FAMILIES for name in (family, f"{family}_backward")]
SMALL = {"tokens": (1, 5), "widths": ((24, 16),), "blocks": (4, 8), "ranks": (2,)}


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
    assert operator in _registry.OPERATORS
    for call in small_calls(operator):
        arguments = call.arguments()
        exact = call.truth(arguments)
        assert all(t.dtype is torch.float64 for t in exact)
        for backend in ("torch", "native"):
            if call.reason(backend, arguments) is None:
                assert call.error(call.bind(backend, arguments)(), exact) <= call.limit


def test_every_operator_can_be_timed() -> None:
    assert set(OPERATORS) == set(_registry.OPERATORS)
    assert len({str(call) for operator in OPERATORS for call in sweep(operator)}) == sum(
        1 for operator in OPERATORS for _ in sweep(operator)
    )
    with pytest.raises(ValueError, match=r"operator: expected one of block_rotate, .*got 'rotate'"):
        next(sweep("rotate"))


# -- the tuned table --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PEFTK_CACHE_DIR", str(tmp_path))
    _tuning.table.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    _tuning.table.cache_clear()


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
    name = _tuning.device_class("cpu")
    assert bench.write_table(cache / f"{name}.json", name, measured) == len(calls)
    for call in calls:
        arguments = call.arguments()
        bucket = _registry.OPERATORS[operator].bucket
        assert _tuning.lookup(operator, arguments, bucket) == {"torch": 10.0, "native": 20.0}
        with peftk.use_backend("auto"):
            explanation = _registry.OPERATORS[operator].explain(arguments)
        assert (explanation.chosen, explanation.why) == ("torch", "fastest in the tuned table")


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
    kernel = _registry.OPERATORS["block_rotate"].kernel("native")
    if isinstance(kernel, str):
        pytest.skip(kernel)
    wrong = (lambda x, blocks, transpose: kernel[0](x, blocks, not transpose)), kernel[1]
    monkeypatch.setitem(_registry.OPERATORS["block_rotate"]._kernels, "native", wrong)
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


INFO = {
    "suite": "layers",
    "cell": "lora-r16-1024",
    "method": "lora",
    "mode": "forward+backward",
    "tokens": 512,
    "in_features": 1024,
    "out_features": 1024,
    "size": 16,
    "dtype": "float32",
    "parameters": "float32",
}
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
    select = _registry.Operator.select
    with peftk.use_backend("torch"), arms.traced_backends() as found:
        peftk.functional.block_rotate(x, blocks)
    assert found == {"block_rotate": "torch"}
    assert _registry.Operator.select is select


def test_saved_and_peak_bytes() -> None:
    x = torch.ones(64, 32, requires_grad=True)

    def step() -> None:
        # exp saves its result; multiplying by a number saves nothing.
        (x.exp() * 2.0).sum().backward()

    found = arms.Arm("exp", step, owned=lambda: [x])
    assert arms.saved_bytes(found) == x.numel() * 4
    assert arms.peak_bytes(found) >= 2 * x.numel() * 4


# -- the report -------------------------------------------------------------------------------------------------------


def synthetic(seed: int = 0) -> dict[str, Any]:
    """A file as pytest-benchmark writes it, with one comparison of every suite."""
    generator = random.Random(seed)
    versions = {"python": "3.12", "peftk": "0.1.0", "torch": "2.13.0", "peft": "0.21.2", "lycoris_lora": "4.1.3"}
    machine = {
        "device_class": "cpu-test",
        "processor": "a <processor>",
        "cores": 2,
        "threads": 2,
        "date": "2026-01-02",
        "load_before": 0.1,
        "load_after": 2.0,
        "versions": versions,
        "rounds": 5,
        "calls_per_sample": 1,
    }

    def measured(us: float, reference: float, **kwargs: Any) -> dict[str, Any]:
        times = [us * generator.uniform(0.99, 1.01) for _ in range(5)]
        return {
            "status": "measured",
            "note": "",
            "errors": {"output": 1e-7, "dx": 2e-7},
            "limit": 1e-5,
            "backends": {"low_rank_linear": "native"},
            "samples_us": times,
            "median_us": sorted(times)[2],
            "min_us": min(times),
            "ratio": us / reference,
            "ratio_q25": us / reference * 0.99,
            "ratio_q75": us / reference * 1.01,
            "saved_bytes": 1024,
            "peak_bytes": 4096,
            **kwargs,
        }

    def benchmark(suite: str, cell: str, reference: str, found: dict[str, Any], **info: Any) -> dict[str, Any]:
        info = {**INFO, **machine, "suite": suite, "cell": cell, "reference": reference, **info, "arms": found}
        return {"fullname": f"benchmarks/bench_{suite}.py::test[{cell}]", "extra_info": info}

    layer = {
        "peftk": measured(1080.0, 1000.0),
        "frozen": measured(1000.0, 1000.0),
        "hf": measured(2500.0, 1000.0),
        "compile": {"status": "skipped", "note": "", "reason": "no C++ compiler"},
        "lycoris": {
            "status": "void",
            "note": "",
            "reason": "error against float64 above 1.0e-05: output 2.0e-02",
            "errors": {"output": 2e-2, "dx": 1e-7},
            "limit": 1e-5,
            "backends": {},
        },
    }
    return {
        "benchmarks": [
            benchmark("layers", "lora-r16-1024", "frozen", layer),
            benchmark("kernels", "k", "torch", {"native": measured(10, 20), "torch": measured(20, 20)}),
            benchmark(
                "functions",
                "f",
                "eager",
                {a: measured(10, 20) for a in ("native", "torch", "eager", "compile")},
            ),
            benchmark(
                "overhead",
                "block_rotate-forward-torch",
                "kernel",
                {"peftk": measured(30, 20), "kernel": measured(20, 20)},
                mode="forward",
            ),
            {"fullname": "benchmarks/bench_layers.py::test_layer[dead]", "extra_info": {"suite": "layers"}},
        ],
        "not_measured": {"benchmarks/bench_layers.py::test_layer[dead]": "failed: OutOfMemoryError: | no"},
    }


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(synthetic()))
    return path


def test_csv_has_one_line_for_each_arm(run_file: Path, tmp_path: Path) -> None:
    found = results.read([run_file])
    target = tmp_path / "results.csv"
    results.write_csv(target, found.comparisons)
    with target.open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == results.COLUMNS
        rows = list(reader)
    assert len(rows) == 5 + 2 + 4 + 2
    by_arm = {row["arm"]: row for row in rows if row["suite"] == "layers"}
    ours = by_arm["peftk"]
    assert (ours["status"], ours["backends"], ours["samples"], ours["device_class"]) == (
        "measured",
        "native",
        "5",
        "cpu-test",
    )
    assert float(ours["ratio"]) == pytest.approx(1.08)
    assert float(ours["p20_us"]) <= float(ours["median_us"]) <= float(ours["p80_us"])
    assert float(ours["error_output"]) == 1e-7
    assert float(ours["error_gradients"]) == 2e-7
    assert ours["torch"] == "2.13.0"
    void = by_arm["lycoris"]
    assert (void["status"], void["samples"], void["median_us"], void["ratio"]) == ("void", "0", "", "")
    assert void["error_output"] == "0.02"


def test_a_later_run_of_the_same_cell_wins(run_file: Path, tmp_path: Path) -> None:
    later = synthetic(seed=1)
    later["benchmarks"] = later["benchmarks"][:1]
    later["benchmarks"][0]["extra_info"]["date"] = "2026-02-03"
    newer = tmp_path / "zz.json"
    newer.write_text(json.dumps(later))
    found = results.read([run_file, newer])
    assert [c.info["date"] for c in found.comparisons] == ["2026-02-03", *["2026-01-02"] * 3]


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"x\.json: expected a file that pytest-benchmark wrote"):
        results.read([path])
    path.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match="expected at least one comparison"):
        results.read([path])


def test_tables_name_targets_void_rows_and_reasons(run_file: Path) -> None:
    found = {table.title: table for table in tables.everything(results.read([run_file]))}
    header, row = (
        found["Layers: forward + backward as a multiple of the frozen layer"].header,
        found["Layers: forward + backward as a multiple of the frozen layer"].rows[0],
    )
    cells = dict(zip(header, row, strict=True))
    assert cells["layer"] == "LoRA r16, 1024², fp32"
    assert cells["peftk"] == "1.080x (1.07-1.09)"
    assert cells["target"] == "<= 1.10x met"
    assert cells["torch.compile"] == "skipped"
    assert cells["LyCORIS"] == "void"
    (speed,) = found["Layers: how much faster peftk is"].rows
    assert float(speed[1].removesuffix("x")) == pytest.approx(2500 / 1080, rel=0.03)
    assert speed[2:4] == ("-", "-")
    reasons = {row[:2]: row[2] for row in found["Not measured"].rows}
    assert reasons[("test_layer[dead]", "")] == "failed: OutOfMemoryError: | no"
    assert reasons[("LoRA r16, 1024², fp32", "compile")] == "skipped: no C++ compiler"
    (dispatch,) = found["Dispatch: microseconds a call, forward"].rows
    assert float(dispatch[2]) == pytest.approx(10, abs=1)
    assert dispatch[4] == "met"
    assert all(len(row) == len(table.header) for table in found.values() for row in table.rows)


def test_a_target_for_other_hardware_is_no_verdict() -> None:
    info = {**INFO, "dtype": "bfloat16", "parameters": "bfloat16", "device_class": "cpu-avx2"}
    comparison = results.Comparison({**info, "arms": {}})
    assert tables.target(comparison) == 1.6
    assert not tables.binding(comparison)
    assert tables.binding(results.Comparison({**info, "device_class": "cpu-amx", "arms": {}}))


def test_report_is_written_whole(run_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    from benchmarks import report

    folder = tmp_path / "report"
    report.main([str(run_file), "--output", str(folder)])
    written = {path.name for path in folder.iterdir()}
    plots = {"overhead", "speed_up", "errors", "memory", "kernels", "dispatch"}
    assert written == {"results.json", "results.csv", "report.md", "report.html", *(f"{name}.png" for name in plots)}
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(plots)
    assert "http" not in page, "the page needs nothing from elsewhere"
    assert "a &lt;processor&gt;" in page
    text = (folder / "report.md").read_text()
    assert "failed: OutOfMemoryError: \\| no" in text
    for line in text.splitlines():
        for name in (part.partition(")")[0] for part in line.split("](")[1:]):
            assert name in written
    kept = json.loads((folder / "results.json").read_text())
    assert [item["suite"] for item in kept["comparisons"]] == ["layers", "kernels", "functions", "overhead"]
    assert len(kept["comparisons"][0]["arms"]["peftk"]["samples_us"]) == 5
