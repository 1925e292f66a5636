"""``python -m peftk doctor``: the report, its exit code, and that its self-test sees a wrong kernel."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import json
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

import peftk
from peftk import ops
from peftk.commands import doctor
from peftk.kernels import native as native_kernels
from peftk.runtime import registry, settings, timings
from peftk.testing.calls import KINDS
from peftk.testing.self_test import doctor_cases, run_case

app = typer.Typer()
app.command()(doctor.doctor)

has_native = native_kernels.unavailable() is None
FIELDS = {
    "schema": int,
    "ok": bool,
    "versions": dict,
    "extension": dict,
    "devices": list,
    "cpu": dict,
    "backend": dict,
    "tuned_tables": list,
    "operators": list,
    "self_test": list,
    "orthogonality": list,
}


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def broken(monkeypatch):
    """Replace one kernel of the torch backend."""

    def replace(name: str, function) -> None:
        operator = registry.OPERATORS[name]
        operator.kernel("torch")
        monkeypatch.setitem(operator._kernels, "torch", (function, None))

    return replace


def test_json_report_is_complete():
    done = invoke("--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert {k: type(v) for k, v in report.items()} == FIELDS
    assert report["ok"] is True
    assert report["versions"]["peftk"] == peftk.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert {row["operator"] for row in report["operators"]} == set(registry.OPERATORS)
    for row in report["operators"]:
        assert [c["backend"] for c in row["candidates"]] == list(settings.BACKENDS)
        assert row["chosen"] == ("native" if has_native else "torch")
        for candidate in row["candidates"]:
            assert candidate["reason"] or candidate["backend"] in ("torch", "native")


def test_every_public_operator_is_tested_on_every_backend():
    rows = doctor.examine()["self_test"]
    for name in peftk.functional.__all__:
        states = {row["backend"]: row["status"] for row in rows if row["operator"] == name}
        expected = {"torch": "passed", "native": "passed" if has_native else "unavailable", "triton": "unavailable"}
        assert states == expected, name
    for row in rows:
        assert (row["error"] is None) == (row["status"] == "unavailable")
        assert row["error"] is None or 0 < row["error"] <= row["limit"], "an error of zero would mean no test"


def test_tables_fit_the_screen():
    done = invoke()
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= doctor.WIDTH
    assert done.output.rstrip().endswith("All good.")
    for name in registry.OPERATORS:
        assert name in done.output


def test_orthogonality_is_measured():
    rows = doctor.orthogonality()
    exact = [row for row in rows if row["transform"] == "exact"]
    series = [row for row in rows if row["transform"] != "exact"]
    assert len(exact) == len(series) >= 3
    assert all(row["status"] == "passed" for row in rows)
    # The series leaves the orthogonal group as the norm grows; the exact transform does not.
    assert [row["error"] for row in series] == sorted(row["error"] for row in series)
    assert series[-1]["error"] > 1000 * exact[-1]["error"]
    # What passes is not therefore a rotation.
    assert all("R is a rotation" in row["meaning"] for row in exact)
    assert ["not a rotation" in row["meaning"] for row in series] == [row["inherent"] > 0.1 for row in series]
    assert "not a rotation" in series[-1]["meaning"]


def test_a_wrong_forward_kernel_fails(broken):
    right = registry.OPERATORS["block_rotate"].kernel("torch")[0]
    broken("block_rotate", lambda x, blocks, transpose: right(x, blocks, not transpose))
    done = invoke()
    assert done.exit_code == 1
    assert "FAILED" in done.output


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda grad, packed, *rest: -torch.ones_like(packed), None),
        (lambda grad, packed, *rest: torch.full_like(packed, torch.nan), "the result is not finite"),
        (lambda *args: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["wrong", "nan", "raises"],
)
def test_a_wrong_backward_kernel_fails(broken, wrong, reason):
    broken("cayley_backward", wrong)
    report = json.loads(invoke("--json").output)
    failed = [row for row in report["self_test"] if row["status"] == "failed"]
    assert not report["ok"]
    assert {(row["operator"], row["backend"]) for row in failed} == {("cayley", "torch")}
    assert [row["reason"] for row in failed] == [reason] * 2


def test_a_call_that_a_backend_refuses_is_no_failure(monkeypatch):
    operator = registry.OPERATORS["cayley"]
    monkeypatch.setitem(operator._kernels, "native", (operator.kernel("torch")[0], lambda *args: "not on Sundays"))
    report = json.loads(invoke("--json").output)
    rows = [row for row in report["self_test"] if (row["operator"], row["backend"]) == ("cayley", "native")]
    assert report["ok"]
    assert {(row["status"], row["reason"]) for row in rows} == {("unavailable", "not on Sundays")}


def test_a_transform_that_is_not_orthogonal_fails(broken):
    right = registry.OPERATORS["cayley"].kernel("torch")[0]
    broken("cayley", lambda *args: right(*args) * 1.001)
    with peftk.use_backend("torch"):
        assert {row["status"] for row in doctor.orthogonality()} == {"failed"}


def test_a_missing_extension_is_a_state(monkeypatch):
    reason = "peftk._C, the compiled extension, cannot be imported: blocked by the test"
    monkeypatch.setattr(doctor, "unavailable", lambda: reason)
    for operator in registry.OPERATORS.values():
        monkeypatch.setitem(operator._kernels, "native", reason)
    done = invoke()
    assert done.exit_code == 0
    assert "not installed, so operators run on the torch backend: blocked by the test" in " ".join(done.output.split())
    report = json.loads(invoke("--json").output)
    assert report["extension"]["state"] == "missing"
    assert {row["chosen"] for row in report["operators"]} == {"torch"}
    assert {row["status"] for row in report["self_test"] if row["backend"] == "native"} == {"unavailable"}


@pytest.mark.skipif(not has_native, reason="peftk._C is not installed here")
def test_an_outdated_extension_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "__version__", "99.0")
    found = doctor.extension()
    assert found["state"] == "outdated"
    assert f"built from peftk {peftk.__version__}, and this is peftk 99.0" in found["reason"]
    assert "OUTDATED" in invoke().output


@pytest.mark.parametrize(("built", "line"), [([], "without CUDA"), (["8.0", "9.0a"], "CUDA for 8.0, 9.0a")])
def test_the_architectures_of_the_extension_are_named(built, line):
    facts = {"version": "1", "torch": "2", "compiler": "3", "cuda_architectures": built}
    found = {"state": "loaded", "reason": None, "built_from": facts, "capability": "avx2"}
    assert f"compiler 3, {line}; uses avx2" in doctor._extension_line(found)


def test_a_named_backend_that_cannot_run_is_an_error():
    with peftk.use_backend("triton"):
        report = json.loads((done := invoke("--json")).output)
        assert done.exit_code == 1
        assert not report["ok"]
        assert {row["chosen"] for row in report["operators"]} == {None}
        assert "NOTHING" in invoke().output


def test_an_unknown_backend_setting_is_an_error():
    code = "from peftk.commands.doctor import doctor; import typer; typer.run(doctor)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "", "PEFTK_BACKEND": "cpp"}
    )
    assert done.returncode == 1
    assert done.stderr == "Error: PEFTK_BACKEND: expected one of auto, native, torch, triton; got 'cpp'\n"


def test_tuned_tables_are_counted(monkeypatch, tmp_path):
    name = timings.device_class("cpu")
    row = {"dtype": "float32", "bucket": [5, 6, 3], "microseconds": {"torch": 2.0, "native": 1.0}}
    (tmp_path / f"{name}.json").write_text(json.dumps({"operators": {"block_rotate": [row]}}))
    monkeypatch.setenv("PEFTK_CACHE_DIR", str(tmp_path))
    user = next(row for row in doctor.tables() if row["origin"] == "user")
    assert (user["cells"], user["reason"]) == (1, None)
    (tmp_path / f"{name}.json").write_text("[]")
    user = next(row for row in doctor.tables() if row["origin"] == "user")
    assert user["cells"] is None
    assert user["reason"].startswith("cannot be read")


def test_show_writes_to_any_console():
    from rich.console import Console

    out = io.StringIO()
    doctor.show(doctor.examine(), Console(file=out, width=60))
    assert max(map(len, out.getvalue().splitlines())) <= 60


def test_help_names_the_option():
    assert "--json" in invoke("--help").output
    assert inspect.getdoc(doctor.doctor)


def test_every_operator_has_a_case_that_the_doctor_runs():
    """And every name that a family marks is that of a case."""
    chosen = doctor_cases()
    assert {case.operator for case in chosen} == set(KINDS)
    for family in ops.__all__:
        cases = importlib.import_module(f"peftk.testing.cases.{family}")
        assert {str(case) for case in cases.CASES} >= cases.DOCTOR, f"DOCTOR of {family}"


def test_a_wrong_kernel_is_found(monkeypatch):
    for case in doctor_cases():
        wrong = dataclasses.replace(case, formula=lambda case=case, **given: 1.001 * case.formula(**given))
        assert run_case(wrong, "torch")["status"] == "failed", case
