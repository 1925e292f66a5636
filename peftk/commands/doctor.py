"""``python -m peftk doctor``: what this machine has, which backend runs each operator and why, and whether it is right.

The self-test runs every public operator, forward and backward, on every backend that can, against its dense formula
differentiated in float64. A backend that is not there is a state that is shown, not a failure.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from .._version import __version__
from ..kernels.native import unavailable
from ..runtime import registry, settings, timings
from ..testing.calls import KINDS, Call
from ..testing.compare import LIMITS
from ..testing.self_test import doctor_cases, orthogonality, run_case

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
"""The version of the JSON report; it rises when a field goes or changes its meaning."""

WIDTH = 100
TOKENS, FEATURES = 128, 512

Report = dict[str, Any]


def explain_operators(device: str = "cpu") -> list[Report]:
    """Ask the registry about a representative call of every operator, forward and backward."""
    rows = []
    for name, operator in registry.OPERATORS.items():
        call = Call(name, TOKENS, FEATURES, FEATURES, KINDS[name.removesuffix("_backward")].usual)
        found = operator.explain(call.arguments(device))
        rows.append(
            {"call": str(call), "device": device, **asdict(found), "candidates": list(map(asdict, found.candidates))}
        )
    return rows


def extension() -> Report:
    """Describe the compiled extension: whether it is there, and what it was built from."""
    reason = unavailable()
    if reason is not None:
        return {"state": "missing", "reason": reason, "built_from": None, "capability": None}
    from .. import _C

    built = _C.build_info()
    state, why = "loaded", None
    if built["version"] != __version__:
        state, why = "outdated", f"it was built from peftk {built['version']}, and this is peftk {__version__}"
    return {"state": state, "reason": why, "built_from": built, "capability": _C.cpu_capability()}


def tables() -> list[Report]:
    """List the tuned tables of this machine's devices: those of the wheel, and the user's own."""
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        name = timings.device_class(device)
        near = timings.nearest(name)
        places = [(name, "shipped", timings.SHIPPED), (name, "user", settings.cache_dir())]
        if near is not None:
            places.append((near, "nearest", timings.SHIPPED))
        for owner, origin, folder in places:
            path = folder / f"{owner}.json"
            row: Report = {"device_class": owner, "origin": origin, "path": str(path), "cells": None, "reason": None}
            if not path.is_file():
                row["reason"] = "there is none"
            else:
                try:
                    row["cells"] = sum(map(len, timings._read(path).values()))
                except (OSError, ValueError, KeyError, TypeError) as failure:
                    row["reason"] = f"cannot be read: {type(failure).__name__}: {failure}"
            rows.append(row)
    return rows


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def devices() -> list[Report]:
    """List the devices that torch sees."""
    rows = [{"device": "cpu", "name": _cpu_name(), "device_class": timings.device_class("cpu")}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name, kind = torch.cuda.get_device_name(index), timings.device_class("cuda", index)
        rows.append({"device": f"cuda:{index}", "name": name, "device_class": kind})
    return rows


def examine() -> Report:
    """Gather the whole report. Its fields are stable as long as ``schema`` is the same."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    operators = [row for kind in kinds for row in explain_operators(kind)]
    stuck = [row for row in operators if row["chosen"] is None]
    tests = [run_case(c, backend, kind) for kind in kinds for c in doctor_cases() for backend in settings.BACKENDS]
    asked = settings.backend()
    # A backend that was named and cannot run leaves nothing to measure.
    turns = [] if any(row["operator"] == "cayley" for row in stuck) else orthogonality()
    return {
        "schema": SCHEMA,
        "ok": not stuck and all(row["status"] != "failed" for row in (*tests, *turns)),
        "versions": {
            "peftk": __version__,
            "torch": torch.__version__,
            "triton": _triton_version(),
            "python": platform.python_version(),
        },
        "extension": extension(),
        "devices": devices(),
        "cpu": {"torch_capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
        "backend": {"setting": asked, "from": "the default" if asked == "auto" else "PEFTK_BACKEND"},
        "tuned_tables": tables(),
        "operators": operators,
        "self_test": tests,
        "orthogonality": turns,
    }


def _table(console: Console, title: str, rows: Sequence[tuple[str, ...]], heads: tuple[str, ...]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, show_header=any(heads), box=None, padding=(0, 2, 0, 0))
    styles = {"passed": "green", "FAILED": "bold red", "not here": "dim"}
    for row in rows:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    console.print(title, style="bold")
    console.print(table)
    console.print()


def _extension_line(found: Report) -> str:
    built = found["built_from"]
    if built is None:
        return "not installed, so operators run on the torch backend: " + found["reason"].partition(": ")[2]
    facts = f"built from peftk {built['version']}, torch {built['torch']}, compiler {built['compiler']}"
    if found["state"] == "outdated":
        return f"OUTDATED: {found['reason']}; install peftk again. {facts}"
    architectures = ", ".join(built["cuda_architectures"])
    cuda = f"CUDA for {architectures}" if architectures else "without CUDA"
    return f"{facts}, {cuda}; uses {found['capability']}"


def _operator_rows(report: Report) -> list[tuple[str, str, str]]:
    several = len({row["device"] for row in report["operators"]}) > 1
    rows = []
    for row in report["operators"]:
        name = row["operator"] + (f" ({row['device']})" if several else "")
        rows.append((name, row["chosen"] or "NOTHING", row["why"]))
    return rows


def _reasons(report: Report) -> list[tuple[str, str, str]]:
    """Group the reasons against backends, so that each is told once."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in report["operators"]:
        for candidate in row["candidates"]:
            if candidate["reason"] is not None:
                grouped.setdefault((candidate["backend"], candidate["reason"]), []).append(row["operator"])
    rows = []
    for (backend, reason), names in grouped.items():
        both = [n for n in names if not n.endswith("_backward") or n.removesuffix("_backward") not in names]
        rows.append((backend, ", ".join(dict.fromkeys(both)), reason))
    return rows


def show(report: Report, console: Console) -> None:
    """Print a report for people."""
    versions, cpu = report["versions"], report["cpu"]
    state = {"passed": "passed", "failed": "FAILED", "unavailable": "not here"}
    facts = [
        ("peftk", f"{versions['peftk']} on Python {versions['python']}"),
        ("torch", f"{versions['torch']}; triton {versions['triton'] or 'is not installed'}"),
        ("peftk._C", _extension_line(report["extension"])),
        *((d["device"], f"{d['name']} ({d['device_class']})") for d in report["devices"]),
        ("threads", f"{cpu['threads']}; torch uses {cpu['torch_capability']}"),
        ("backend", f"{report['backend']['setting']}, from {report['backend']['from']}"),
        *(
            (f"{t['origin']} table", f"{t['path']}: " + (t["reason"] or f"{t['cells']} tuned cells"))
            for t in report["tuned_tables"]
        ),
    ]
    _table(console, "This machine", facts, ("", ""))
    _table(
        console,
        f"Which backend runs a call of {TOKENS} tokens, {FEATURES} features, block size 32 or rank 16, in float32",
        _operator_rows(report),
        ("operator", "backend", "why"),
    )
    if reasons := _reasons(report):
        _table(console, "Why other backends do not", reasons, ("backend", "operators", "reason"))
    results = [
        (
            f"{row['operator']} {row['variant']}".strip(),
            row["backend"] if row["device"] == "cpu" else f"{row['backend']} ({row['device']})",
            "" if row["error"] is None else f"{row['error']:.1e}",
            state[row["status"]],
            (row["reason"] or "") if row["status"] == "failed" else "",
        )
        for row in report["self_test"]
        if row["status"] != "unavailable"
    ]
    limit = f"{LIMITS[torch.float32]:.0e}"
    _table(
        console,
        f"Self-test: output and gradients against float64; the worst element may be off by {limit}",
        results,
        ("operator", "backend", "error", "result", ""),
    )
    turns = [
        (r["transform"], f"{r['norm']}", f"{r['error']:.1e}", state[r["status"]], r["meaning"])
        for r in report["orthogonality"]
    ]
    if turns:
        _table(
            console,
            "Orthogonality of Cayley blocks: max |R R^T - I|, 0 for a rotation; passed: as in float64",
            turns,
            ("transform", "|S|", "error", "result", "what it means"),
        )
    verdict = "[green]All good.[/]" if report["ok"] else "[bold red]Something is wrong; see above.[/]"
    console.print(verdict)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")] = False,
) -> None:
    """Say what this machine has, which backend runs each operator and why, and test that it is right."""
    try:
        report = examine()
    except ValueError as failure:
        # A setting that cannot be understood, such as PEFTK_BACKEND=cpp.
        typer.echo(f"Error: {failure}", err=True)
        raise typer.Exit(1) from failure
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        from rich.console import Console

        console = Console()
        show(report, Console(width=min(WIDTH, console.width) if console.is_terminal else WIDTH, highlight=False))
    if not report["ok"]:
        raise typer.Exit(1)
