"""The tests of `peftk.accelerate` with every supported version of Hugging Face PEFT and transformers, and AdapterHub.

``python -m tools.matrix`` (make test-matrix) lays each set of packages over this environment, in a folder of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What transformers 5.17 needs, and a later version replaced.
OLDER = {"huggingface-hub": "1.33.0", "httpx": "0.28.1", "httpcore": "1.0.9", "certifi": "2026.10.18"}
PAIRS = (
    {"peft": "0.19.1", "transformers": "5.17.0", **OLDER},
    # Its BOFT imports a name that later versions of torchao have no more.
    {"peft": "0.20.0", "transformers": "5.17.0", "torchao": "0.16.0", **OLDER},
    {"peft": "0.21.2", "transformers": "5.17.0", **OLDER},
    {"peft": "0.21.2", "transformers": "5.24.0"},
)
"""Each with the packages that go before those of this environment. The first two are those that are tested."""

ADAPTERHUB = {
    "adapters": "1.3.0",
    "transformers": "4.57.6",
    "huggingface-hub": "0.36.0",
    "tokenizers": "0.22.1",
}
"""AdapterHub is for an older transformers, with which only its own tests run."""


def overlay(folder: Path, packages: dict[str, str]) -> list[str]:
    """Install packages without what they need, each in a folder of its own, and return the folders."""
    folders = []
    for name, wanted in packages.items():
        target = folder / f"{name}-{wanted}"
        if not target.is_dir():
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
            subprocess.run([*install, f"{name}=={wanted}"], check=True)
        folders.append(str(target))
    return folders


def main(arguments: list[str]) -> int:
    """Run the tests for every pair, print how each ended, and return whether one failed."""
    ends = {}
    for pair in (*PAIRS, ADAPTERHUB):
        folders = overlay(ROOT / "build" / "matrix", pair)
        tests = "tests/integrations/test_adapterhub.py" if pair is ADAPTERHUB else "tests/integrations"
        path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
        call = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "--dist",
            "loadgroup",
            tests,
            *arguments,
        ]
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        name = ", ".join(f"{package} {version}" for package, version in list(pair.items())[:2])
        print(f"== {name}", flush=True)
        ends[name] = subprocess.run(call, cwd=ROOT, env=environment, check=False).returncode
    for name, status in ends.items():
        print(f"{name}: {'passed' if status == 0 else f'failed, {status}'}")
    return int(any(ends.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
