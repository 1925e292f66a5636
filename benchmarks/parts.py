"""Runs the parts of an unattended job, one or several at once: what one of them does cannot lose another one's results.

Every part is a process group of its own with its own time limit and its own log, and the record of the whole job is
written again after each of them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# From an interrupt, on which pytest still writes its summary, to the end of the process group.
GRACE = 5.0
BAD = ("failed", "crashed", "timed out")


@dataclass(frozen=True)
class Part:
    """One process of a job.

    Attributes:
        name: short and unique; the name of its log.
        says: what it does, for the header.
        command: what is run, in the root of the checkout.
        limit: seconds.
        read: reads its log and exit status: counts by kind, and what is wrong (None if nothing is).
        environment: variables that it gets beside those of this process.
        not_run: why it cannot run here at all.
        alone: it runs when the others are over, with none beside it.
    """

    name: str
    says: str
    command: tuple[str, ...]
    limit: float
    read: Callable[[str, int], tuple[dict[str, int], str | None]] = lambda log, status: ({}, None)
    environment: dict[str, str] = field(default_factory=dict)
    not_run: str | None = None
    alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a part: passed, failed, crashed, timed out or not run."""

    name: str
    status: str
    seconds: float
    counts: dict[str, int]
    detail: str

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {kind}" for kind, number in self.counts.items())
        text = "; ".join(filter(None, (counts, self.detail)))
        return f"{self.status:<9} {self.name:<22} {self.seconds:5.0f} s  {text}".rstrip()


def header(title: str, parts: Iterable[Part], seconds: float, folder: Path, at_once: int = 1) -> str:
    """Say what a job will do."""
    beside = f", {at_once} side by side" if at_once > 1 else ""
    lines = [
        title,
        f"At most {seconds:.0f} s in all{beside}; results go to {_shown(folder)}. Parts, each in its own process:",
    ]
    for part in parts:
        lines.append(f"  {part.name:<22} {part.says} (at most {part.limit:.0f} s)")
        if part.not_run:
            lines.append(f"  {'':<22} NOT RUN: {part.not_run}")
    return "\n".join(lines)


def run(
    parts: list[Part],
    logs: Path,
    seconds: float,
    record: Callable[[list[Outcome]], None] = lambda outcomes: None,
    at_once: int = 1,
) -> list[Outcome]:
    """Run parts in their order, and return the outcomes in that order.

    Args:
        parts: what to run.
        logs: the folder of the logs.
        seconds: the limit of all of them together; a part that it leaves no time for is "timed out".
        record: called with all outcomes so far after every part.
        at_once: how many parts run side by side; more than one only where nothing is timed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    order = {part.name: at for at, part in enumerate(parts)}
    outcomes: list[Outcome] = []
    running: set[subprocess.Popen] = set()
    one_at_a_time, interrupted = threading.Lock(), threading.Event()

    def run_one(part: Part) -> None:
        left = end - time.monotonic()
        if part.not_run:
            outcome = Outcome(part.name, "not run", 0.0, {}, part.not_run)
        elif left < min(part.limit, 10.0):
            outcome = Outcome(part.name, "timed out", 0.0, {}, f"the {seconds:.0f} s of the whole run were over")
        else:
            print(f"-- {part.name}: {part.says}", flush=True)
            outcome = _run(part, logs / f"{part.name}.log", min(part.limit, left), running)
        if interrupted.is_set():
            # Ended by the user, not by itself: that is no outcome.
            return
        with one_at_a_time:
            outcomes.append(outcome)
            outcomes.sort(key=lambda known: order[known.name])
            print(outcome, flush=True)
            record(list(outcomes))

    for chosen, beside in (([p for p in parts if not p.alone], at_once), ([p for p in parts if p.alone], 1)):
        with ThreadPoolExecutor(beside) as pool:
            try:
                for part in [pool.submit(run_one, part) for part in chosen]:
                    part.result()
            except BaseException:
                # Interrupted: nothing new begins, and nothing is left behind that holds the device.
                interrupted.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(running):
                    _end(process, 0.0)
                raise
    return outcomes


def _run(part: Part, log: Path, limit: float, running: set[subprocess.Popen]) -> Outcome:
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Outcome(part.name, "failed", 0.0, {}, f"cannot be started: {error.strerror}: {part.command[0]}")
        running.add(process)
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            running.discard(process)
        if status is None:
            _end(process, GRACE)
        else:
            # A part that is done must not leave a process behind that holds the device.
            _signal(process.pid, signal.SIGKILL)
    text = log.read_text(errors="replace")
    took = time.monotonic() - start
    counts, wrong = part.read(text, process.returncode)
    if status is None:
        return Outcome(part.name, "timed out", took, counts, f"ended after {limit:.0f} s; see {log.name}")
    if status < 0:
        return Outcome(part.name, "crashed", took, counts, f"{signal.Signals(-status).name}; see {log.name}")
    if wrong is not None and wrong.startswith("not run: "):
        return Outcome(part.name, "not run", took, counts, wrong.removeprefix("not run: "))
    if wrong is not None or status:
        lines = text.strip().splitlines() or [""]
        return Outcome(part.name, "failed", took, counts, wrong or f"exit status {status}: {lines[-1][:200]}")
    return Outcome(part.name, "passed", took, counts, "")


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _end(process: subprocess.Popen, grace: float) -> None:
    if grace:
        _signal(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def exit_status(outcomes: Iterable[Outcome]) -> int:
    """Return 1 if a part failed, crashed or ran out of time, or nothing ran at all."""
    statuses = [outcome.status for outcome in outcomes]
    return int(any(status in BAD for status in statuses) or "passed" not in statuses)


def summary(outcomes: Iterable[Outcome]) -> str:
    """Return one line for each part."""
    return "\n".join(["Summary", *(f"  {outcome}" for outcome in outcomes)])


TEST = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] (\w+) \S+::|\S+::.*? (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b)", re.M)


def read_pytest(log: str, status: int) -> tuple[dict[str, int], str | None]:
    """Count the tests in the log of ``pytest -v``, which is there even if pytest died, with or without xdist."""
    counts: dict[str, int] = {}
    for match in TEST.finditer(log):
        kind = (match.group(1) or match.group(2)).lower()
        counts[kind] = counts.get(kind, 0) + 1
    if status > 0:
        failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", log, re.M)
        return counts, f"{failures[0][:200]}; see the log" if failures else f"pytest ended with status {status}"
    if status == 0 and not counts.get("passed"):
        return counts, "no test passed: a machine that skips them all proves nothing"
    return counts, None


def versions() -> dict[str, str]:
    """Return the versions of everything that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in ("peftk", "torch", "triton", "peft", "transformers", "lycoris_lora", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def folder_name(device: str) -> str:
    """Return the name of the results folder of a device, such as ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def describe_gpu() -> dict[str, Any]:
    """Describe the first CUDA device.

    Raises:
        SystemExit: if there is none; the message says what was found.
    """
    import torch

    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        sys.exit(
            f"This needs an NVIDIA GPU: torch.cuda.is_available() is False with torch {torch.__version__} ({built}) "
            f"in {sys.executable}. `--list` says what would be run."
        )
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "devices": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }


def write_record(path: Path, device: dict[str, Any], outcomes: list[Outcome]) -> None:
    """Write the outcomes so far, with device, versions and dates; the file is replaced as a whole.

    Parts that an earlier run on the same device and versions did, and this one did not, stay with their own dates.
    """
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    content = {"device": device, "versions": versions()}
    found = {o.name: {**asdict(o), "seconds": round(o.seconds, 1), "date": today} for o in outcomes}
    if path.is_file():
        earlier = json.loads(path.read_text())
        if all(earlier.get(key) == value for key, value in content.items()):
            found = {part["name"]: part for part in earlier["parts"]} | found
    content["parts"] = list(found.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
