"""The report of the benchmarks from a small synthetic run: CSV, tables, Markdown and HTML."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results, tables
from benchmarks.methods import METHODS

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
        "hf": measured(2500.0, 1000.0, remark="computes half of it"),
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
                "block_rotate-forward-native",
                "plain",
                {"peftk": measured(30, 20), "kernel": measured(10, 20), "plain": measured(20, 20)},
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
    assert len(rows) == 5 + 2 + 4 + 3
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


def test_two_runs_on_one_device_are_joined(tmp_path: Path) -> None:
    late, broken = results.OUT_OF_TIME, "failed: ValueError: it does not fit"

    def run(measured: dict[str, str], missing: dict[str, str], date: str) -> results.Results:
        entries = [
            {"fullname": test, "extra_info": {**INFO, "suite": "gpu-kernels", "cell": cell, "date": date, "arms": {}}}
            for cell, test in measured.items()
        ]
        # A kernel's cell may begin like that of the function which calls it.
        path = tmp_path / f"{date}.json"
        path.write_text(json.dumps({"benchmarks": entries, "not_measured": missing}))
        return results.read([path])

    older = run(
        {"cayley-16xb8-forward": "k::cayley-b8", "old": "k::old", "both": "k::both", "breaks": "k::breaks"},
        {"k::cayley-16xb8": late, "k::never": late, "k::mended": broken, "k::broken": broken},
        "2026-01-02",
    )
    newer = run(
        {"both": "k::both", "now-16x8": "k::mended"},
        {"k::old": late, "k::never": late, "k::breaks": broken, "k::another": late},
        "2026-02-03",
    )
    found = results.joined(older, newer)
    assert {c.info["cell"]: c.info["date"] for c in found.comparisons} == {
        **dict.fromkeys(("cayley-16xb8-forward", "old", "breaks"), "2026-01-02"),
        **dict.fromkeys(("both", "now-16x8"), "2026-02-03"),
    }
    assert found.not_measured == {
        **dict.fromkeys(("k::cayley-16xb8", "k::never", "k::another"), late),
        **dict.fromkeys(("k::broken", "k::breaks"), broken),
    }


def test_summary_names_the_versions_of_every_row(run_file: Path) -> None:
    pytest.importorskip("matplotlib", reason="the report draws plots")
    from benchmarks import report

    found = results.read([run_file])
    info = found.comparisons[1].info
    info["versions"] = {**info["versions"], "torch": "2.14.0", "triton": "9"}
    versions = next(line for line in report.summary(found) if line.startswith("Versions: "))
    assert "torch 2.13.0 or 2.14.0" in versions
    assert versions.endswith("triton 9.")


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
    assert cells["HF PEFT eager"] == "2.500x (2.48-2.52) \u2020"
    assert found["Layers: what the daggers mean"].rows == [
        ("LoRA r16, 1024², fp32", "HF PEFT eager", "computes half of it")
    ]
    (speed,) = found["Layers: how much faster peftk is"].rows
    assert float(speed[1].removesuffix("x \u2020")) == pytest.approx(2500 / 1080, rel=0.03)
    assert speed[2:4] == ("-", "-")
    reasons = {row[:2]: row[2] for row in found["Not measured"].rows}
    assert reasons[("test_layer[dead]", "")] == "failed: OutOfMemoryError: | no"
    assert reasons[("LoRA r16, 1024², fp32", "compile")] == "skipped: no C++ compiler"
    (dispatch,) = found["Dispatch: microseconds a call, forward"].rows
    assert float(dispatch[4]) == pytest.approx(20, abs=1)
    assert float(dispatch[5]) == pytest.approx(10, abs=1)
    assert dispatch[6] == "met"
    assert all(len(row) == len(table.header) for table in found.values() for row in table.rows)


def test_every_method_has_a_name_and_its_targets() -> None:
    names = set()
    for name, method in METHODS.items():
        for features, dtype in ((1024, "float32"), (1024, "bfloat16"), (4096, "float32"), (4096, "bfloat16")):
            info = {"method": name, "size": method.size_for(features), "dtype": dtype, "parameters": dtype}
            info |= {"in_features": features, "out_features": features}
            comparison = results.Comparison({**INFO, **info, "device_class": "cpu-amx", "arms": {}})
            names.add(tables.short(comparison))
            asked = tables.target(comparison)
            assert (asked is None) == (name == "dora" or (features, dtype) == (4096, "float32"))
    assert len(names) == 4 * len(METHODS)
    assert {"BOFT b4 m2, 1024², fp32", "C3A b512, 4096², bf16 base, bf16 adapter", "LoKr f8, 4096², fp32"} <= names


def test_a_rare_arm_is_compared_over_the_rounds_that_it_took_part_in() -> None:
    row = {"status": "measured", "note": ""}
    found = {"a": {**row, "samples_us": [2.0, 4.0]}, "b": {**row, "samples_us": [1.0, 2.0, 100.0]}}
    comparison = results.Comparison({**INFO, "arms": found})
    assert comparison.ratio("a", "b") == 2.0
    assert comparison.difference("b", "a") == -1.5


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
    folder.mkdir()
    (folder / "kernels.png").write_bytes(b"of an earlier run")
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
    assert (folder / "kernels.png").read_bytes().startswith(b"\x89PNG")
    content = synthetic()
    content["benchmarks"] = content["benchmarks"][:1]
    run_file.write_text(json.dumps(content))
    report.main([str(run_file), "--output", str(folder)])
    assert not (folder / "kernels.png").exists(), "no data: the plot of the earlier run must go"


def test_a_part_that_is_measured_again_leaves_the_rest_of_the_report(run_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    from benchmarks import report

    folder = tmp_path / "report"
    report.update(results.read([run_file]), folder)
    before = results.read_written(folder / "results.json")
    content = synthetic()
    content["benchmarks"] = content["benchmarks"][:1]
    content["benchmarks"][0]["extra_info"]["date"] = "2031-02-03"
    run_file.write_text(json.dumps(content))
    report.update(results.read([run_file]), folder)
    after = results.read_written(folder / "results.json")
    assert [c.key for c in after.comparisons] == [c.key for c in before.comparisons]
    dates = [c.info["date"] for c in after.comparisons]
    assert dates[0] == "2031-02-03"
    assert dates[1:] == [c.info["date"] for c in before.comparisons[1:]]
