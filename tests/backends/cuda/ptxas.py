"""What ptxas says of the CUDA kernels: registers, shared memory and spills, per file, architecture and kernel.

``python tests/backends/cuda/ptxas.py`` writes the table beside this file anew; do it when a kernel changes, and read
the diff.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TABLE = Path(__file__).with_suffix(".json")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def nvcc_release() -> str:
    """Return nvcc's version, on which the figures depend."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", said).group(1)


def plain_name(symbol: str) -> str:
    """Return ``rotate_kernel<float, 8, true>`` for a mangled name."""
    full = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    full = full.replace("(anonymous namespace)::", "").replace("peftk::", "")
    return re.search(r"\w+_kernel(<[^(]*>)?", full).group(0)


def measure(source: Path, architecture: str, folder: Path) -> dict[str, dict[str, int]]:
    """Compile one file for one architecture and return the figures of every kernel in it."""
    target = folder / f"{source.stem}.{architecture}.cubin"
    done = subprocess.run(
        ["nvcc", "-cubin", f"-arch={architecture}", *FLAGS, str(source), "-o", str(target)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode or "warning" in done.stderr:
        raise AssertionError(done.stderr)
    found = {}
    for entry in ENTRY.finditer(done.stderr):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        found[plain_name(entry["name"])] = {
            "registers": int(entry["registers"]),
            "shared": int(shared.group(1)) if shared else 0,
            "stack": int(entry["stack"]),
            "spills": int(entry["stores"]) + int(entry["loads"]),
        }
    return dict(sorted(found.items()))


def main() -> None:
    """Write the table."""
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is not installed")
    with tempfile.TemporaryDirectory() as folder:
        figures = {s.name: {a: measure(s, a, Path(folder)) for a in ARCHITECTURES} for s in SOURCES}
    TABLE.write_text(json.dumps({"nvcc": nvcc_release(), "kernels": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
