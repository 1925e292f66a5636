"""Every .cu file through nvcc for every architecture: no spills, and the figures of the committed table."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Loaded by path: tests are no package.
spec = importlib.util.spec_from_file_location("ptxas", ROOT / "tests" / "backends" / "cuda" / "ptxas.py")
ptxas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ptxas)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not installed"),
]
AGAIN = "if this is meant, run python tests/backends/cuda/ptxas.py and commit the table"


def cuobjdump() -> str | None:
    """Find the disassembler of the CUDA toolkit, or the one in Triton's package."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return str(carried) if carried and carried.is_file() else None


@pytest.mark.parametrize("architecture", ptxas.ARCHITECTURES)
@pytest.mark.parametrize("source", ptxas.SOURCES, ids=lambda p: p.stem)
def test_figures(source: Path, architecture: str, tmp_path: Path) -> None:
    found = ptxas.measure(source, architecture, tmp_path)
    assert found
    assert {name: f["spills"] + f["stack"] for name, f in found.items()} == dict.fromkeys(found, 0)
    # What a kernel may have without asking the driver for more.
    assert max(f["shared"] for f in found.values()) <= 48 << 10
    table = json.loads(ptxas.TABLE.read_text())
    expected = table["kernels"][source.name][architecture]
    assert found.keys() == expected.keys(), AGAIN
    if ptxas.nvcc_release() == table["nvcc"]:
        assert found == expected, AGAIN
    if source.stem == "block_diagonal" and (tool := cuobjdump()):
        check_accesses(tool, tmp_path / f"{source.stem}.{architecture}.cubin")


def check_accesses(tool: str, cubin: Path) -> None:
    """The kernels that move pieces read and write activations sixteen bytes at a time."""
    code = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : ", code)[1:]
    pieces = [f for f in functions if "rotate_kernel" in f.partition("\n")[0]]
    assert len(pieces) == 24
    for function in pieces:
        name = function.partition("\n")[0]
        assert re.search(r"\bLDG\.E\.128", function), name
        stores = set(re.findall(r"\bSTG\.\S+", function))
        gradient = "Lb1E" in name
        # The partial sums of a gradient are single floats.
        assert "STG.E.128" in stores and stores <= {"STG.E.128"} | ({"STG.E"} if gradient else set()), name


def test_the_table_is_of_this_source() -> None:
    table = json.loads(ptxas.TABLE.read_text())["kernels"]
    assert set(table) == {s.name for s in ptxas.SOURCES}
    for source in ptxas.SOURCES:
        text = source.read_text()
        included = [source.parent / name for name in re.findall(r'#include "([\w.]+)"', text)]
        text = re.sub(r"\s+", " ", text + "".join(header.read_text() for header in included))
        defined = set(re.findall(r"\b(\w+_kernel)\(", text))
        for architecture in ptxas.ARCHITECTURES:
            assert {name.partition("<")[0] for name in table[source.name][architecture]} == defined
