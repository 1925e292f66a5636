"""The CUDA kernels as C++ on the CPU: results, bits in three orders, sanitizers, and that planted errors are found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "tests" / "backends" / "cuda" / "kernels.cpp"
COMPILER = os.environ.get("CXX") or "g++"
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-I", str(SOURCE.parent), "-x", "c++"),
]
KINDS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}
ENVIRONMENT = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
# One group: every program is compiled once, also where the tests are spread over processes.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cuda-emulated")]

BARRIERS = [
    (path.name, number)
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if "__syncthreads();" in line
]


def run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Callable[[str], Path]:
    """Compile the program, plain or with sanitizers; skip only where the compiler is missing or brings none."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"the C++ compiler {COMPILER!r} is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    built: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in built:
            if KINDS[kind]:
                (folder / "empty.cpp").write_text("int main() { return 0; }\n")
                tried = run(COMPILER, *KINDS[kind], folder / "empty.cpp", "-o", folder / "empty")
                if tried.returncode or run(folder / "empty").returncode:
                    pytest.skip(f"{COMPILER} {KINDS[kind][0]} makes no program that runs here: {tried.stderr[-200:]}")
            done = run(COMPILER, *FLAGS, *KINDS[kind], SOURCE, "-o", folder / kind)
            assert done.returncode == 0, done.stderr
            built[kind] = folder / kind
        return built[kind]

    return build


def outcome(done: subprocess.CompletedProcess) -> tuple[int, str]:
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.fullmatch(r"(\d+) checks, hash (\w{16})\n", done.stdout)
    return int(found[1]), found[2]


def test_every_kernel_is_right_and_gives_the_same_bits_in_every_order(program):
    assert outcome(run(program("plain"), "up"))[0] > 1_000_000
    up, down, shuffled = (outcome(run(program("plain"), order, "few")) for order in ("up", "down", "shuffled"))
    assert up == down == shuffled


def test_address_and_undefined_behaviour_sanitizers_find_nothing(program):
    for order in ("up", "shuffled"):
        assert outcome(run(program("asan"), order, "few"))[0] > 100_000


@pytest.mark.parametrize("order", ["up", "shuffled"])
def test_thread_sanitizer_finds_no_race(program, order):
    done = run(program("tsan"), order, "few")
    assert outcome(done)[0] > 100_000
    assert "WARNING: ThreadSanitizer" not in done.stderr


@pytest.mark.parametrize(
    ("mode", "finding"),
    [
        ("planted-write", "heap-buffer-overflow"),
        ("planted-shared", "heap-buffer-overflow"),
        ("planted-shift", "shift exponent"),
    ],
)
def test_a_planted_error_is_found(program, mode, finding):
    done = run(program("asan"), mode)
    assert done.returncode != 0
    assert finding in done.stderr


def test_a_planted_race_is_found(program):
    done = run(program("tsan"), "planted-race")
    assert done.returncode == 66
    assert "data race" in done.stderr
    assert "race_kernel" in done.stderr


@pytest.mark.parametrize(("file", "line"), BARRIERS, ids=lambda v: str(v))
def test_every_barrier_is_needed_and_its_absence_seen(program, file, line):
    """The kernels themselves, with each of their barriers left out in turn."""
    done = run(program("tsan"), "without", file, line)
    assert done.returncode == 66, f"{file}:{line}: no race without this barrier"
    assert "data race" in done.stderr


@pytest.mark.parametrize(
    ("mode", "message", "marker"),
    [
        ("planted-divergence", "divergent barrier: the threads of a block wait at different lines", "} else {"),
        ("planted-return", "divergent barrier: other threads of the block have returned", "threadIdx.x == 7"),
        ("planted-deadlock", "deadlock: threads wait at different barriers", "if (threadIdx.x == 0) __syncwarp"),
    ],
)
def test_a_wrong_barrier_is_reported_with_its_line(program, mode, message, marker):
    done = run(program("plain"), mode)
    assert done.returncode == 3
    assert message in done.stderr
    line = int(re.search(r"kernels\.cpp:(\d+), block \(0, 0, 0\), thread \d+", done.stderr)[1])
    lines = SOURCE.read_text().splitlines()
    nearby = "\n".join(lines[line - 4 : line + 2])
    assert "__sync" in lines[line - 1] and marker in nearby, nearby


def test_a_launch_that_fails_names_the_kernel(program):
    done = run(program("plain"), "planted-launch")
    assert done.returncode == 1
    assert done.stdout == "the CUDA kernel race_kernel was not launched: invalid configuration argument\n"
