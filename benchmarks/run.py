"""Runs all benchmarks and writes the report: ``python -m benchmarks.run [--quick] [--resume] [--only SUITE ...]``.

Every suite runs in a process of its own, and every comparison is written as soon as it is done, so neither a crash nor
an interruption loses another one; a cell that fails is listed in the report with its reason. ``--resume`` keeps what an
interrupted run has written and measures the rest. What the report of this machine class holds beside that stays in it,
each figure with its date and versions: ``--only`` and ``-k`` measure a part of it again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from .report import RESULTS, update, write
from .results import read

HERE = Path(__file__).parent

# Suite to (file, -k expression): the layers are split so that an interruption costs a part of them only.
SUITES = {
    "overhead": ("bench_overhead.py", ""),
    "operators": ("bench_operators.py", ""),
    "model": ("bench_model.py", ""),
    "layers": ("bench_layers.py", "not bf16"),
    "layers-half": ("bench_layers.py", "bf16"),
    "accelerate": ("bench_accelerate.py", ""),
    "lycoris": ("bench_lycoris.py", ""),
    "steps": ("bench_steps.py", ""),
    "decode": ("bench_decode.py", ""),
    "growth": ("bench_growth.py", ""),
    "experts": ("bench_experts.py", ""),
}


# A comparison that has begun is finished, so a run may take some minutes longer.
MINUTES = 120.0


def command(
    suite: str, folder: Path, target: Path, quick: bool, resume: bool, until: float, chosen: str = ""
) -> list[str]:
    """Return the pytest call of one suite."""
    file, expression = SUITES[suite]
    expression = " and ".join(f"({part})" for part in (expression, chosen) if part)
    call = [sys.executable, "-m", "pytest", str(HERE / file), "-q", "-p", "no:cacheprovider"]
    call += ["--benchmark-enable", "--benchmark-only", "--benchmark-disable-gc", f"--benchmark-json={target}"]
    call += ["--benchmark-columns=median,rounds", "--benchmark-warmup=off", "--no-header", "--tb=short", "-v"]
    call += ["-k", expression] if expression else []
    call += ["--bench-cells", str(folder / "cells" / suite)]
    call += ["--bench-until", str(until)]
    call += ["--bench-quick"] if quick else []
    call += ["--bench-resume", str(folder)] if resume else []
    return call


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, run the suites, write the report, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few samples, small shapes: to try it, not to measure")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run has measured")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin no comparison after so many minutes")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES), help="these suites only")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="these comparisons only, as pytest's -k says")
    parser.add_argument("--work", type=Path, default=Path("bench-out"), help="folder of the JSON files")
    parser.add_argument("--output", type=Path, help="folder of the report; default benchmarks/results/<device class>")
    options = parser.parse_args(arguments)
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2 and not options.quick:
        print(f"The machine is busy (load {load:.1f} on {cores} cores): the times will be disturbed.", file=sys.stderr)
    worst, until = 0, time.time() + 60 * options.minutes
    for suite in options.only:
        old = sorted(options.work.glob(f"{suite}.*.json"))
        if not options.resume:
            for path in [*old, *options.work.glob(f"cells/{suite}/*.json")]:
                path.unlink()
            old = []
        target = options.work / f"{suite}.{len(old):03d}.json"
        start = time.monotonic()
        call = command(suite, options.work, target, options.quick, options.resume, until, options.k)
        try:
            status = subprocess.run(call, cwd=HERE.parent, check=False).returncode
        except KeyboardInterrupt:
            print(f"{suite}: interrupted; --resume goes on from here", file=sys.stderr)
            return 130
        # 5 means that everything was left out: a resumed suite that was complete.
        worst = max(worst, 0 if status == 5 else status)
        print(f"{suite}: {time.monotonic() - start:.0f} s, status {status}", flush=True)
    # The newest counts where a comparison was made twice; an interrupted pytest leaves an empty file.
    files = sorted((p for p in options.work.rglob("*.json") if p.stat().st_size), key=lambda p: p.stat().st_mtime)
    try:
        results = read(path for path in files if path.name != "results.json")
    except ValueError as error:
        print(f"no report: {error}", file=sys.stderr)
        return worst or 1
    if options.quick:
        # Few samples of small shapes belong to no report of a machine class.
        written = write(results, options.output or options.work)
    else:
        written = update(results, options.output or RESULTS / results.info["device_class"])
    print("report:", *(str(path) for path in written if path.suffix in (".md", ".html")))
    return worst


if __name__ == "__main__":
    sys.exit(main())
