"""The GPU benchmark, tried out on the CPU with tiny sizes: a typo should not wait for a GPU."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_cells, gpu_timing, parts, results
from benchmarks.arms import Arm
from benchmarks.methods import METHODS, Cell, available
from peftk.runtime import registry, settings, timings
from peftk.testing.calls import Call

F32, BF16 = torch.float32, torch.bfloat16
PLAIN = [Call(name, 24, 32, 40, 8) for name in ("block_rotate", "low_rank_add", "low_rank_add_backward")]
SMALL = [*PLAIN, Call("cayley", 0, 32, 32, 8, F32, "neumann"), Call("cayley_backward", 0, 32, 32, 8)]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_timing, "LEAST", 3)
    monkeypatch.setattr(gpu_timing, "MOST", 3)
    # Compiling takes half a minute, and tests/commands/test_bench.py does it already.
    reason = lambda *_: "left out by the test"  # noqa: E731
    monkeypatch.setattr("benchmarks.peers.why_no_compiler", reason)
    monkeypatch.setattr(gpu_cells, "why_no_compiler", reason)


def statuses(info: dict[str, Any]) -> dict[str, str]:
    return {name: found["status"] for name, found in info["arms"].items()}


@pytest.mark.parametrize("method", available())
def test_layers(method: str) -> None:
    cell = Cell(method, 4 if method == "boft" else 8, 32, 24, F32, F32, 64)
    both, forward = gpu_cells.layer(cell, "cpu", 0.0)
    assert (both["suite"], forward["suite"]) == ("layers", "layers-forward")
    found = statuses(both)
    for arm in ("peftk", "frozen", "peftk-torch"):
        assert found[arm] == "measured", both["arms"][arm]["reason"]
        row = both["arms"][arm]
        assert len(row["samples_us"]) == len(row["wall_samples_us"]) == both["rounds"] == 3
        assert row["ratio_q25"] <= row["ratio"] <= row["ratio_q75"]
        assert row["wall_ratio"] > 0 and row["first_seconds"] >= 0
        assert max(row["errors"].values()) <= row["limit"]
    assert set(both["arms"]["peftk-torch"]["backends"].values()) == {"torch"}
    assert found["peftk-triton"] == "skipped", "no backend stands in for another"
    if method == "lora":
        assert {name for name in found if name.startswith("peftk-triton-")} == {
            "peftk-triton-D0",
            "peftk-triton-D0-expand-first",
            "peftk-triton-D1",
        }
    if importlib.util.find_spec("peft"):
        assert found["hf"] == "measured", both["arms"]["hf"]["reason"]
    # Its OFT rotates the output, which has another size here.
    if importlib.util.find_spec("lycoris") and METHODS[method].no_lycoris is None and method != "oft-exact":
        assert found["lycoris"] == "measured", both["arms"]["lycoris"]["reason"]
    assert found["compile"] == "skipped"
    assert "kernels" not in forward["arms"]["frozen"]
    assert forward["cell"] != both["cell"]


@pytest.mark.parametrize("call", SMALL, ids=str)
def test_kernels(call: Call) -> None:
    (info,) = gpu_cells.kernel(call, "cpu", 0.0)
    assert statuses(info)["torch"] == "measured"
    assert info["reference"] == "torch" and info["arms"]["torch"]["ratio"] == 1.0


@pytest.mark.parametrize("neumann", [True, False])
def test_cayley(neumann: bool) -> None:
    both, forward = gpu_cells.cayley(8, neumann, "cpu", 0.0, features=32)
    for info in (both, forward):
        found = statuses(info)
        assert found["peftk"] == found["peftk-torch"] == found["eager"] == "measured"
        assert found["peftk-triton"] == "skipped"
    if importlib.util.find_spec("peft"):
        assert found["hf"] == "measured", both["arms"]["hf"]["reason"]


def test_products() -> None:
    forward, dx = gpu_cells.gemm(40, "cpu", 0.0, 24, 32, F32)
    assert statuses(forward)["cublas"] == statuses(dx)["cublas"] == "measured"
    assert statuses(dx)["D0"] == statuses(dx)["D0-expand-first"] == "measured"
    assert statuses(dx)["D1"] == "skipped"
    assert "Triton" in dx["arms"]["D1"]["reason"]


def test_a_row_that_fell_back_is_refused() -> None:
    import peftk

    x, blocks = torch.randn(4, 8), torch.randn(2, 4, 4)
    run = lambda: peftk.functional.block_rotate(x, blocks)  # noqa: E731
    arm = Arm("peftk-triton", run, lambda: {"output": 0.0 * run().sum().item()}, 1.0)
    gpu_timing.inspect(arm, "cpu", "triton")
    assert arm.found["status"] == "void"
    assert arm.found["reason"].startswith("refused: not all of it ran on triton, but block_rotate on ")


def tiny_jobs() -> list:
    def broken() -> Iterator[dict[str, Any]]:
        raise ValueError("it does not fit")
        yield

    jobs = [(str(PLAIN[0]), lambda: gpu_cells.kernel(PLAIN[0], "cpu", 0.0)), ("broken", broken)]
    jobs.append(("lora", lambda: gpu_cells.layer(Cell("lora", 8, 32, 24, F32, F32, 40), "cpu", 0.0, peers=False)))
    jobs.append(("gemm", lambda: gpu_cells.gemm(40, "cpu", 0.0, 24, 32, F32)))
    return [*jobs, ("cayley", lambda: gpu_cells.cayley(8, True, "cpu", 0.0, features=32))]


def test_part_writes_every_comparison_and_the_report_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cells" / "kernels"
    assert gpu.measure("kernels", folder, 60.0, tiny_jobs()) == 1, "one of them failed"
    log = capsys.readouterr().out
    assert gpu.read_cells(log, 1) == ({"measured": 4, "failed": 1}, "broken: failed: ValueError: it does not fit")
    assert gpu.measure("gemm", tmp_path / "cells" / "gemm", -1.0, tiny_jobs()) == 1, "nothing was measured"
    assert gpu.read_cells(capsys.readouterr().out, 1) == ({"measured": 0, "left out": 5}, None)
    found = results.read(tmp_path.glob("cells/*/*.json"))
    assert {c.info["suite"] for c in found.comparisons} == {
        "gpu-kernels",
        "layers",
        "layers-forward",
        "gpu-gemm",
        "gpu-cayley",
        "gpu-cayley-forward",
    }
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    gpu.report(tmp_path, tmp_path / "report", {"name": "none"}, [])
    text = (tmp_path / "report" / "report.md").read_text()
    for title in (
        "GPU: forward + backward as a multiple of the bare products",
        "GPU: forward as a multiple of the bare product",
        "GPU: Triton's product with LoRA inside (D1) beside the vendor's alone",
        "GPU: the Cayley transform",
        "GPU: raw operators",
        "Costs on paper, for an H200",
        "Not measured",
    ):
        assert f"## {title}" in text, title
    assert "failed: ValueError: it does not fit" in text
    assert (tmp_path / "report" / "overhead.png").is_file()
    kept = json.loads((tmp_path / "report" / "results.json").read_text())
    assert all("wall_samples_us" in row for c in kept["comparisons"] for row in c["arms"].values() if "ratio" in row)
    # A second run that has time for one comparison loses nothing, and begins with what the first one lacks.
    written = tmp_path / "report" / "results.json"
    order = [name for name, _ in gpu.by_need("kernels", tiny_jobs(), written)]
    assert order == ["broken", str(PLAIN[0]), "lora", "gemm", "cayley"]
    assert [name for name, _ in gpu.by_need("kernels", tiny_jobs(), tmp_path / "none.json")] == [
        name for name, _ in tiny_jobs()
    ]
    for path in (tmp_path / "cells").glob("*/*.json"):
        path.unlink()
    assert gpu.measure("kernels", folder, 60.0, tiny_jobs()[:1]) == 0
    gpu.report(tmp_path, tmp_path / "report", {"name": "none"}, [])
    again = results.read_written(written)
    assert {c.key for c in again.comparisons} == {c.key for c in found.comparisons}
    assert again.not_measured["kernels::broken"] == "failed: ValueError: it does not fit"
    wall_times_have_a_picture_of_their_own(again)


def wall_times_have_a_picture_of_their_own(found: results.Results) -> None:
    from benchmarks import plots

    assert plots.overhead(found, wall=True) is None, "on a CPU there is no other time"
    (comparison,) = found.of("layers")
    comparison.info["clock"] = "events"
    comparison.rows["peftk"].found.update(ratio=1.25, wall_ratio=2.5, wall_ratio_q25=2.4, wall_ratio_q75=2.6)
    for wall, value, label in ((False, "1.25", "device time"), (True, "2.50", "wall time")):
        (axes,) = plots.overhead(found, wall=wall).axes
        assert value in {text.get_text() for text in axes.texts}
        assert axes.get_xlabel().startswith(f"{label} of forward + backward")
    assert "overhead_wall" in {name for name, _, _ in plots.draw(found)}


def test_operators_prefer_on_gpus_what_was_faster() -> None:
    measured = set()
    found = results.read_written(parts.RESULTS / "nvidia-h200" / "results.json")
    for comparison in found.of("gpu-kernels"):
        native, triton = (comparison.rows[backend] for backend in ("native", "triton"))
        if native.measured and triton.measured:
            operator = registry.OPERATORS[comparison.info["cell"].partition("-")[0]]
            faster, wall = (native.found[key] / triton.found[key] for key in ("median_us", "wall_median_us"))
            better = faster > timings.TIE and wall > 1 / timings.TIE
            assert operator.on_gpus == (registry.TRITON_FIRST if better else settings.BACKENDS), (
                operator.name,
                faster,
                wall,
            )
            measured.add(operator.name)
    # These are made of the kernels of others, which were measured.
    alike = {"circular_conv", "circular_conv_backward", "circulant_linear", "circulant_linear_backward"}
    preferring = {name for name, operator in registry.OPERATORS.items() if operator.on_gpus == registry.TRITON_FIRST}
    assert preferring - alike <= measured
    assert len(measured) > 8


class Event:
    """torch.cuda.Event on a clock that only sleeping moves."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_device_time_is_that_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(cycles: int) -> None:
        Event.now += 1e-6 * cycles

    for name in ("Event", "_sleep", "synchronize"):
        assert hasattr(torch.cuda, name), "the fake has a name that torch has"
    assert list(inspect.signature(torch.cuda.Event.elapsed_time).parameters) == ["self", "end_event"]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    weave = gpu_timing.ColdWeave({"one": lambda: sleep(10**6), "two": lambda: sleep(2 * 10**6)}, "cpu")
    weave._cuda = True
    assert weave._cycles_a_second() == pytest.approx(1e9)
    weave._cycles = 1e9
    weave.run(3)
    assert weave.device_samples["one"] == pytest.approx([1e-3] * 3)
    assert weave.device_samples["two"] == pytest.approx([2e-3] * 3)
    assert all(seconds > 0 for seconds in weave.wall_samples["one"])


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_kernels_that_the_profiler_cannot_see_are_not_counted_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    with pytest.raises(RuntimeError, match="the profiler saw no kernel"):
        gpu_timing.kernels(lambda: torch.ones(4) + 1)


def test_sizes_are_those_of_the_targets() -> None:
    cells = [cell for out in gpu_cells.OUTS for cell in gpu_cells.layer_cells(out)]
    assert {(c.tokens, c.features, c.dtype) for c in cells} == {(8192, 4096, BF16)}
    for out in gpu_cells.OUTS:
        wanted = {("lora", 16), ("lora", 64)} | {(f"oft-{k}", b) for k in ("exact", "neumann") for b in (32, 64, 256)}
        assert {(c.method, c.size) for c in cells if c.out_features == out and c.parameters is BF16} == wanted
    relatives = gpu_cells.relative_cells()
    assert {(c.tokens, c.features, c.out_features, c.dtype) for c in relatives} == {(8192, 4096, 4096, BF16)}
    assert {c.method for c in relatives} | {"lora", "oft-exact", "oft-neumann"} == set(available())
    asked = {(name, size) for name, method in METHODS.items() for size in method.gpu_targets}
    targets = asked - {(c.method, c.size) for c in cells}
    assert targets <= {(c.method, c.size) for c in relatives}, "every target has its row"
    cells += relatives
    assert len({str(cell) for cell in cells}) == len(cells)
    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= gpu.SECONDS
    assert len({name for part in gpu.PARTS for name, _ in gpu.jobs(part)}) == sum(len(gpu.jobs(p)) for p in gpu.PARTS)
