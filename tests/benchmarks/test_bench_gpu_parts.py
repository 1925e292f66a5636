"""The runner of the unattended GPU jobs, with parts that pass, fail, crash, hang and cannot run."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_tests, parts
from benchmarks.parts import Part


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


@pytest.fixture
def jobs(tmp_path: Path) -> list[Part]:
    hang = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); print('tests/a.py::test_one PASSED [ 50%]');"
        "time.sleep(60)"
    )
    return [
        Part("good", "passes", python("print('tests/a.py::test_one PASSED [100%]')"), 20, parts.read_pytest),
        Part("bad", "fails", python("print('it is broken'); raise SystemExit(3)"), 20),
        Part("dead", "crashes", python("import os; os.kill(os.getpid(), 11)"), 20),
        Part("slow", "hangs", python(hang), 1.5, parts.read_pytest),
        Part("absent", "cannot run", python("raise SystemExit(9)"), 20, not_run="there is no such tool"),
        Part("nowhere", "has no program", ("/nonexistent/program",), 20),
        Part("last", "passes too", python("import os; print(os.environ['WORD'])"), 20, environment={"WORD": "said"}),
    ]


def test_no_part_loses_the_results_of_another(
    jobs: list[Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(parts, "GRACE", 0.2)
    target = tmp_path / "results" / "tests.json"
    seen: list[int] = []

    def record(outcomes: list[parts.Outcome]) -> None:
        parts.write_record(target, {"name": "a device"}, outcomes)
        seen.append(len(json.loads(target.read_text())["parts"]))

    outcomes = parts.run(jobs, tmp_path / "logs", 60, record)
    assert seen == list(range(1, len(jobs) + 1)), "written after every part"
    assert {o.name: o.status for o in outcomes} == {
        "good": "passed",
        "bad": "failed",
        "dead": "crashed",
        "slow": "timed out",
        "absent": "not run",
        "nowhere": "failed",
        "last": "passed",
    }
    by_name = {o.name: o for o in outcomes}
    assert by_name["good"].counts == {"passed": 1}
    assert by_name["bad"].detail == "exit status 3: it is broken"
    assert by_name["dead"].detail.startswith("SIGSEGV")
    assert by_name["slow"].counts == {"passed": 1}, "what it had done before is counted"
    assert (tmp_path / "logs" / "last.log").read_text().strip() == "said"
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("a part that ran out of time left a process behind")
    kept = json.loads(target.read_text())
    assert set(kept) == {"device", "versions", "parts"}
    assert kept["versions"]["torch"]
    assert [part["status"] for part in kept["parts"]] == [o.status for o in outcomes]
    assert parts.exit_status(outcomes) == 1
    lines = parts.summary(outcomes).splitlines()
    assert len(lines) == 1 + len(jobs)
    assert all(job.name in line for job, line in zip(jobs, lines[1:], strict=True))
    assert "-- good: passes" in capsys.readouterr().out


def test_exit_status() -> None:
    def outcomes(*statuses: str) -> list[parts.Outcome]:
        return [parts.Outcome(s, s, 0.0, {}, "") for s in statuses]

    assert parts.exit_status(outcomes("passed", "not run")) == 0
    assert parts.exit_status(outcomes("not run")) == 1, "nothing ran"
    for bad in parts.BAD:
        assert parts.exit_status(outcomes("passed", bad)) == 1


def test_the_whole_run_has_a_limit(tmp_path: Path) -> None:
    (found,) = parts.run([Part("late", "", python(""), 30)], tmp_path, 0.0)
    assert (found.status, found.detail) == ("timed out", "the 0 s of the whole run were over")


LOG = """\
[gw0] [ 10%] PASSED tests/ops/test_operators.py::test_a[x-triton-f32]
[gw1] [ 20%] SKIPPED tests/ops/test_operators.py::test_a[x-triton-f64]
tests/test_b.py::test_b[a b] PASSED                                    [ 30%]
tests/test_b.py::test_c SKIPPED (needs two devices)                    [ 40%]
tests/test_b.py::test_d FAILED                                         [ 50%]
FAILED tests/test_b.py::test_d - AssertionError: no
"""


def test_tests_are_counted_with_and_without_xdist() -> None:
    counts, wrong = parts.read_pytest(LOG, 1)
    assert counts == {"passed": 2, "skipped": 2, "failed": 1}
    assert wrong is not None and "test_d - AssertionError: no" in wrong
    counts, wrong = parts.read_pytest("tests/test_b.py::test_c SKIPPED (no GPU) [100%]\n", 0)
    assert counts == {"skipped": 1} and wrong is not None and "no test passed" in wrong
    assert parts.read_pytest("usage: pytest: unrecognized arguments: --device", 4) == ({}, "pytest ended with status 4")


WATCHED = """\
========= COMPUTE-SANITIZER
{finding}90 calls checked
========= {summary}
"""
CLEAN, RACE = "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"


def test_findings_of_the_sanitizer_are_read() -> None:
    def read(finding: str, summary: str, status: int) -> tuple[dict[str, int], str | None]:
        return gpu_tests.read_sanitizer("racecheck", WATCHED.format(finding=finding, summary=summary), status)

    assert read("", CLEAN, 0) == ({"calls": 90, "findings": 0}, None)
    counts, wrong = read("========= Error: Race reported\n", RACE, gpu_tests.ERROR_STATUS)
    assert counts["findings"] == 2 and wrong == "Error: Race reported; see the log"
    counts, wrong = read("cayley of x: result 0 is wrong\n", CLEAN, 1)
    assert wrong is not None and wrong.startswith("the driver ended with status 1")
    counts, wrong = read("========= Error: Device not supported. Please refer to the manual\n", CLEAN, 1)
    assert wrong is not None and wrong.startswith("not run: compute-sanitizer cannot watch this device")
    assert gpu_tests.read_sanitizer("memcheck", "", 127) == ({}, "memcheck wrote no summary; exit status 127")


def test_what_the_sanitizer_watches_is_right_and_covers_every_cuda_file(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(gpu_tests.__file__).parent.parent
    monkeypatch.syspath_prepend(str(root / "tests" / "backends" / "gpu"))
    sanitize = importlib.import_module("sanitize")
    ran, wrong = sanitize.watch("cpu")
    assert not wrong
    # On the CPU the C++ kernels take the same calls, and more.
    operators = {call.operator for call in ran}
    families = {path.stem for path in (root / "csrc" / "cuda").glob("*.cu")}
    assert families, "the CUDA kernels moved"
    for family in families:
        family_of = importlib.import_module(f"peftk.testing.calls.{family}")
        assert operators & set(family_of.KINDS), f"csrc/cuda/{family}.cu is not watched"


def test_parts_side_by_side(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    wait = "import pathlib, sys, time\npathlib.Path({mine!r}).touch()\n"
    wait += "end = time.time() + 15\nwhile not pathlib.Path({other!r}).exists():\n"
    wait += "    assert time.time() < end, 'they do not run side by side'\n    time.sleep(0.05)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    jobs = [
        Part(
            "last",
            "sees both",
            python(f"import os; assert os.path.exists({a!r}) and os.path.exists({b!r})"),
            20,
            alone=True,
        ),
        Part("a", "waits for b", python(wait.format(mine=a, other=b)), 20),
        Part("b", "waits for a", python(wait.format(mine=b, other=a)), 20),
    ]
    outcomes = parts.run(jobs, tmp_path / "logs", 60, lambda done: seen.append([o.name for o in done]), at_once=2)
    assert [(o.name, o.status) for o in outcomes] == [(job.name, "passed") for job in jobs]
    assert [len(names) for names in seen] == [1, 2, 3] and seen[-1] == ["last", "a", "b"]


def test_folder_of_a_device() -> None:
    assert parts.folder_name("NVIDIA H200") == "nvidia-h200"
    assert parts.folder_name("NVIDIA GeForce RTX 4090 (Laptop)") == "nvidia-geforce-rtx-4090-laptop"


@pytest.mark.parametrize("module", ["benchmarks.gpu_tests", "benchmarks.gpu"])
def test_job_says_what_it_would_do_without_a_gpu(module: str) -> None:
    call = [sys.executable, "-m", module, "--list"]
    found = subprocess.run(call, cwd=parts.ROOT, capture_output=True, text=True, check=True)
    assert "Parts, each in its own process:" in found.stdout
    assert "benchmarks/results/" in found.stdout
    limit = float(found.stdout.partition("At most ")[2].partition(" s ")[0])
    assert limit <= 560, "10 minutes with the build"
    each = [float(number) for number in re.findall(r"\(at most (\d+) s\)", found.stdout)]
    at_once = int((re.search(r"(\d+) side by side", found.stdout) or [0, 1])[1])
    longest = max(each) if at_once > 1 else 0.0
    assert longest + sum(each) / at_once <= limit, "a part that hangs may not take the time of another one"


def test_parts_of_an_earlier_run_stay_unless_versions_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(name: str, status: str = "passed") -> parts.Outcome:
        return parts.Outcome(name, status, 1.0, {}, "")

    target = tmp_path / "bench.json"
    parts.write_record(target, {"name": "a device"}, [outcome("one"), outcome("two")])
    parts.write_record(target, {"name": "a device"}, [outcome("two", "failed")])
    found = {part["name"]: part["status"] for part in json.loads(target.read_text())["parts"]}
    assert found == {"one": "passed", "two": "failed"}
    monkeypatch.setattr(parts, "versions", lambda: {"torch": "another"})
    parts.write_record(target, {"name": "a device"}, [outcome("two")])
    assert [part["name"] for part in json.loads(target.read_text())["parts"]] == ["two"]
