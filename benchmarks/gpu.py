"""Measures on a GPU: ``python -m benchmarks.gpu [--list] [--only PART ...]``, or `make bench-gpu`.

Every part is a process of its own, and every comparison is written as soon as it is done; the report is written again
after every part.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import parts
from .parts import Part
from .results import OUT_OF_TIME, read, read_written

SECONDS = 520.0
WORK = parts.ROOT / "build" / "bench-gpu"
# Of the limit of a part, what is kept for the start of its process.
START = 15.0

Job = tuple[str, Callable[[], Iterator[dict[str, Any]]]]

# Part to what it measures, and its seconds.
PARTS = {
    "gemm": ("Triton's product with LoRA inside (D1) against cuBLAS, at the table's three shapes", 45.0),
    "layers-4096": (
        "LoRA r16 r64, OFT b32 b64 b256 (series and exact) on 8192 x 4096 -> 4096, beside their peers",
        140.0,
    ),
    "relatives-4096": (
        "DoRA r16, LoHa r8, LoKr f8, BOFT b4 m2, C3A b128, AdaLoRA r12 on the same, beside theirs",
        110.0,
    ),
    "kernels": ("raw operators on every backend, and the Cayley transform beside its peers", 115.0),
    "layers-11008": ("the first layers, 4096 -> 11008", 60.0),
    "layers-14336": ("the first layers, 4096 -> 14336", 50.0),
}


def jobs(part: str) -> list[Job]:
    """Return the comparisons of a part, by name; importing torch is left to the process that runs them."""
    from . import gpu_cells as cells

    device = "cuda"
    if part == "gemm":
        return [(f"gemm-{out}", functools.partial(cells.gemm, out, device, 1.5)) for out in cells.OUTS]
    if part == "kernels":
        found = [
            (
                f"cayley-b{size}-{'neumann' if neumann else 'exact'}",
                functools.partial(cells.cayley, size, neumann, device, 0.4),
            )
            for size in (32, 64, 256)
            for neumann in (True, False)
        ]
        return found + [
            (str(call), functools.partial(cells.kernel, call, device, 0.5)) for call in cells.kernel_calls()
        ]
    chosen = cells.relative_cells() if part == "relatives-4096" else cells.layer_cells(int(part.rpartition("-")[2]))
    return [(str(cell), functools.partial(cells.layer, cell, device, 1.2)) for cell in chosen]


def by_need(part: str, found: list[Job], earlier: Path) -> list[Job]:
    """Put the comparisons first that the results of earlier runs lack: there may be no time for all of them."""
    known = {c.info["test"] for c in read_written(earlier).comparisons} if earlier.is_file() else set()
    return sorted(found, key=lambda job: f"{part}::{job[0]}" in known)


def measure(part: str, folder: Path, seconds: float, chosen: list[Job]) -> int:
    """Run the comparisons of a part, one file each, as long as there is time; return the exit status."""
    end = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    done, missing, longest = 0, {}, 0.0
    for name, job in chosen:
        start = time.monotonic()
        # The next one may take as long as the longest so far.
        if start + longest > end:
            missing[f"{part}::{name}"] = OUT_OF_TIME
            print(f"{name}: no time is left", flush=True)
            continue
        entries = []
        try:
            for info in job():
                entries.append({"fullname": f"{part}::{name}", "extra_info": info})
        except Exception as error:
            message = (str(error).strip().splitlines() or [""])[0][:300]
            missing[f"{part}::{name}"] = f"failed: {type(error).__name__}: {message}"
        target = folder / f"{re.sub(r'[^0-9A-Za-z+-]+', '_', name)}.json"
        target.write_text(json.dumps({"benchmarks": entries}))
        longest = max(longest, time.monotonic() - start)
        done += bool(entries)
        print(f"{name}: {len(entries)} comparisons, {time.monotonic() - start:.1f} s", flush=True)
        if f"{part}::{name}" in missing:
            print(f"{name}: {missing[f'{part}::{name}']}", flush=True)
            # A kernel that faulted has ruined the CUDA context: nothing after it would be right.
            if re.search("CUDA error|AcceleratorError|illegal", missing[f"{part}::{name}"]):
                break
    (folder / "missing.json").write_text(json.dumps({"benchmarks": [], "not_measured": missing}))
    left_out = sum(reason == OUT_OF_TIME for reason in missing.values())
    print(f"cells: {done} measured, {len(missing) - left_out} failed, {left_out} left out for want of time")
    return int(len(missing) > left_out or not done)


def read_cells(log: str, status: int) -> tuple[dict[str, int], str | None]:
    """Count the cells of a part from its log, which is there even if it died."""
    counts = {"measured": len(re.findall(r"^\S.*: [1-9]\d* comparisons, ", log, re.M))}
    failed = re.findall(r"^(\S+: failed: .*)$", log, re.M)
    left_out = len(re.findall(r": no time is left$", log, re.M))
    counts.update({key: number for key, number in (("failed", len(failed)), ("left out", left_out)) if number})
    return counts, failed[0][:250] if failed else None


def report(work: Path, folder: Path, device: dict[str, Any], outcomes: list[parts.Outcome]) -> None:
    """Write what there is so far: JSON, CSV, Markdown, HTML and plots; what an earlier run measured stays."""
    parts.write_record(folder / "bench.json", device, outcomes)
    from .report import update

    files = sorted(work.glob("cells/*/*.json"), key=lambda path: (path.name == "missing.json", path.stat().st_mtime))
    try:
        results = read(files)
    except ValueError as error:
        print(f"no report yet: {error}", flush=True)
        return
    update(results, folder)


def all_parts(chosen: list[str] | None) -> list[Part]:
    """Return what `make bench-gpu` runs."""
    found = []
    for name, (says, limit) in PARTS.items():
        if chosen and name not in chosen:
            continue
        call = (sys.executable, "-m", "benchmarks.gpu", "--measure", name)
        found.append(Part(name, says, call, limit, read_cells))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, measure, write the report, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="only say what would be measured")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts only")
    # What the process of one part is called with.
    parser.add_argument("--measure", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        earlier = parts.RESULTS / parts.folder_name(parts.describe_gpu()["name"]) / "results.json"
        chosen = by_need(options.measure, jobs(options.measure), earlier)
        return measure(options.measure, WORK / "cells" / options.measure, PARTS[options.measure][1] - START, chosen)
    chosen = all_parts(options.only)
    title = (
        "GPU benchmark of peftk: device time (events) and wall time with a cold L2 cache, all arms in turns, against\n"
        "the bare products, HF PEFT, LyCORIS and torch.compile; errors against float64, memory and launches beside."
    )
    if options.list:
        print(parts.header(title, chosen, SECONDS, parts.RESULTS / "<device>"))
        return 0
    device = parts.describe_gpu()
    folder = parts.RESULTS / parts.folder_name(device["name"])
    print(parts.header(title, chosen, SECONDS, folder), flush=True)
    print(f"Device: {device}\nVersions: {parts.versions()}\nLogs: {WORK.relative_to(parts.ROOT)}\n", flush=True)
    for part in chosen:
        for path in (WORK / "cells" / part.name).glob("*.json"):
            path.unlink()
    outcomes = parts.run(chosen, WORK, SECONDS, functools.partial(report, WORK, folder, device))
    print(f"\n{parts.summary(outcomes)}\nresults: {folder.relative_to(parts.ROOT)}")
    return parts.exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
