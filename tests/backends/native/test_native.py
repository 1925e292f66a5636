"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a program without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from peftk.kernels import native as native_kernels

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
KERNELS = sorted((Path(__file__).parents[3] / "csrc/cpu").glob("*.cpp"))
COMPILER = os.environ.get("CXX") or "g++"
FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
# One group: the program is compiled once, also where the tests are spread over processes.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("native")]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def harness(tmp_path_factory) -> Path:
    """Compile the program once; skip only where the compiler brings no sanitizers."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"the C++ compiler {COMPILER!r} is not installed")
    folder = tmp_path_factory.mktemp("native")
    (folder / "empty.cpp").write_text("int main() { return 0; }\n")
    tried = run(COMPILER, *SANITIZERS, folder / "empty.cpp", "-o", folder / "empty")
    if tried.returncode:
        pytest.skip(f"{COMPILER} cannot link the sanitizers: {tried.stderr.strip().splitlines()[-1]}")

    def compiled(source: Path) -> Path:
        built = run(COMPILER, *FLAGS, *SANITIZERS, "-c", source, "-o", folder / f"{source.stem}.o")
        assert built.returncode == 0, built.stderr
        return folder / f"{source.stem}.o"

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    linked = run(COMPILER, *SANITIZERS, *objects, "-o", folder / "kernels")
    assert linked.returncode == 0, linked.stderr
    return folder / "kernels"


def test_every_kernel_is_clean_and_right(harness):
    done = run(harness)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) checks", done.stdout).group(1)) > 1_000_000
    assert re.findall(r"family (\w+)", done.stdout) == [kernels.stem for kernels in KERNELS]
    ran = re.findall(r"level (\w+)", done.stdout)
    if native_kernels.unavailable() is None:
        from peftk import _C

        order = ["base", "avx2", "avx512"]
        assert ran == order[: order.index(_C.cpu_capability()) + 1], "an instruction set of this CPU was not run"


@pytest.mark.parametrize(
    ("mode", "finding"),
    [("planted-write", "heap-buffer-overflow"), ("planted-shift", "shift exponent")],
)
def test_a_planted_error_is_found(harness, mode, finding):
    done = run(harness, mode)
    assert done.returncode != 0
    assert finding in done.stderr
