"""Runs everything that only a GPU can show: ``python -m benchmarks.gpu_tests [--list] [--only PART ...]``.

This is `make test-gpu`. Every part is a process of its own: a kernel that faults ruins the CUDA context of its process,
and with it every later test there.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import shutil
import sys

from . import parts
from .parts import Part

TESTS = parts.ROOT / "tests"
# With the build below 10 minutes.
SECONDS = 515.0
# Nothing is timed here, so parts share the device. A part that hangs holds one place, and the others share the rest:
# the longest limit and the sum of all, divided by this, stay below SECONDS.
AT_ONCE = 4
WORK = parts.ROOT / "build" / "test-gpu"

# File of tests/backends/gpu to what it shows and its seconds.
FILES = {
    "build": ("the extension is there, and its CUDA C++ kernels take calls on this device", 30.0),
    "devices": ("another current device, another stream, bad input on CUDA tensors", 110.0),
    "determinism": ("equal bits over 100 repeats of every operator, forward and backward", 90.0),
    "layers": ("fresh adapters change no bit, saved bytes, training in bf16", 60.0),
    "graphs": ("CUDA graphs of forward and backward: capture, replay with new values", 50.0),
    "large": ("tensors of more than 2^31 elements", 35.0),
}
# It wants the whole memory.
ALONE = ("large",)
SANITIZERS = {
    "memcheck": "accesses outside of memory",
    "racecheck": "races in shared memory",
    "initcheck": "reads of memory that nothing wrote",
}
# Why is said in the driver.
CHECKS = {"initcheck": ("--without-transforms",)}
ERROR_STATUS = 66
# cuBLAS gives equal bits on every stream only with workspaces of its own; it reads this when it starts.
REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def pytest_call(*arguments: str, workers: int = 0) -> tuple[str, ...]:
    """Return a call of pytest whose log names every test."""
    call = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "--color=no"]
    if workers > 1 and importlib.util.find_spec("xdist"):
        call += ["-n", str(workers)]
    return (*call, *arguments)


def read_sanitizer(tool: str, log: str, status: int) -> tuple[dict[str, int], str | None]:
    """Count the calls that the driver made and the findings of compute-sanitizer."""
    if "Device not supported" in log or "Unable to find" in log:
        line = next(line for line in log.splitlines() if "Device not supported" in line or "Unable to find" in line)
        return {}, f"not run: compute-sanitizer cannot watch this device: {line.strip('= ')}"
    checked = re.search(r"^(\d+) calls checked", log, re.M)
    counts = {"calls": int(checked.group(1))} if checked else {}
    found = re.search(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", log)
    if found is None:
        return counts, f"{tool} wrote no summary; exit status {status}"
    counts["findings"] = int(found.group(1))
    if counts["findings"]:
        lines = [line.strip("= ") for line in log.splitlines() if line.startswith("=========")]
        return counts, f"{lines[1][:200] if len(lines) > 1 else tool}; see the log"
    if status:
        lines = [line for line in log.strip().splitlines() if not line.startswith("=========")]
        return counts, f"the driver ended with status {status}: {lines[-1][:200] if lines else ''}"
    return counts, None


def _file(name: str) -> Part:
    says, limit = FILES[name]
    call = pytest_call(str(TESTS / "backends" / "gpu" / f"test_gpu_{name}.py"))
    return Part(name, says, call, limit, parts.read_pytest, REPEATABLE, alone=name in ALONE)


def all_parts() -> list[Part]:
    """Return what `make test-gpu` runs."""
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    operators = str(TESTS / "ops" / "test_operators.py")
    found = [_file("build")]
    for backend, rest, limit in (
        ("triton", "triton", 150.0),
        # opcheck checks schemas and fakes, which know no device.
        ("torch", "not triton and not native and not opcheck", 90.0),
        ("native", "native", 90.0),
    ):
        found.append(
            Part(
                f"operators-{backend}",
                f"every operator x dtype x case on backend {backend}, on the GPU, against float64",
                pytest_call(operators, "--device", "cuda", "-k", rest, workers=workers),
                limit,
                parts.read_pytest,
                REPEATABLE,
            )
        )
    found += [_file(name) for name in FILES if name != "build"]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    for tool, says in SANITIZERS.items():
        call = (sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(ERROR_STATUS))
        found.append(
            Part(
                tool,
                f"compute-sanitizer {tool} on the CUDA C++ kernels: {says}",
                (*call, sys.executable, str(TESTS / "backends" / "gpu" / "sanitize.py"), *CHECKS.get(tool, ())),
                90.0,
                functools.partial(read_sanitizer, tool),
                # One allocation for each tensor, or an overrun would land inside torch's own pool.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                None if sanitizer else "compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin",
            )
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, run the parts, and return the exit status."""
    chosen = all_parts()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tests", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    parser.add_argument("--only", nargs="+", choices=[p.name for p in chosen], help="these parts only")
    options = parser.parse_args(arguments)
    chosen = [part for part in chosen if not options.only or part.name in options.only]
    title = "GPU tests of peftk: every operator, backend and dtype on the GPU, and what only a GPU can show."
    if options.list:
        print(parts.header(title, chosen, SECONDS, parts.RESULTS / "<device>", AT_ONCE))
        return 0
    device = parts.describe_gpu()
    folder = parts.RESULTS / parts.folder_name(device["name"])
    print(parts.header(title, chosen, SECONDS, folder, AT_ONCE), flush=True)
    print(f"Device: {device}\nVersions: {parts.versions()}\nLogs: {WORK.relative_to(parts.ROOT)}\n", flush=True)
    target = folder / "tests.json"
    outcomes = parts.run(chosen, WORK, SECONDS, lambda done: parts.write_record(target, device, done), AT_ONCE)
    print(f"\n{parts.summary(outcomes)}\nresults: {target.relative_to(parts.ROOT)}")
    return parts.exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
