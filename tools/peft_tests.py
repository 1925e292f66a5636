"""Hugging Face PEFT's own tests, without and with `peftk.accelerate`: ``python -m tools.peft_tests`` (make test-peft).

The source distribution of the installed version carries its tests. Those of custom models run twice, the second time
with the classes of the process accelerated, and every one must end as it did the first time: passed, failed, or skipped
for the same reason. Tests that need models from the hub fail both times without the network.

This file is also the plugin that switches acceleration on.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as Xml
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tools.peft_place import REFUSED
from tools.peft_place import SWITCH as IN_PLACE

ROOT = Path(__file__).resolve().parents[1]
FILES = ("test_custom_models.py", "test_mixed.py", "test_lora_variants.py", "test_initialization.py")
METHODS = "(lora or loha or lokr or oft or c3a)"
# Other methods, whose names have one of those in them.
OTHERS = " or ".join(
    "adamss bdlora deft delora gralora hira miss osf randlora shira unilora velora vera".split()  # noqa: SIM905
)
SWITCH = "PEFTK_ACCELERATE"
REFUSALS = {
    "methods other than these nine": rf"(got tools\.peft_place\.|{REFUSED}: )(?!BdLora|Kasa|Monteclora)\w+Config\b",
    "`nn.MultiheadAttention`": r"MultiheadAttention, which cannot be adapted",
    "BD-LoRA, KaSA, MonteCLoRA": r"(use_bdlora|kasa_config|monteclora_config)=.* does not implement",
    "MiCA": r"init_lora_weights='mica': not implemented",
    "DoRA on convolutions with groups": r"use_dora: .* DoRA needs groups=1",
    "batches that mix adapters with `modules_to_save`": r"modules_to_save, which cannot be mixed in a batch",
    "layer classes of one's own": r"_register_custom_module",
    "pickles": r"pickles are refused",
    "`device_map`": r"device_map: an adapter goes where its layers are",
}
"""What the README says that peftk refuses, in its words, and what peftk, or a test that uses it, says then."""


def pytest_configure(config: object) -> None:
    """Accelerate every class of PEFT in this process, if asked; pytest calls this."""
    if os.environ.get(SWITCH):
        import peftk
        from peftk.integrations.hf_peft import lora

        # The models of the tests are small: what is left to PEFT for its size would not be tried.
        lora.FEW_ROWS, lora.conv_pays = 0, lambda layer, x: True
        report = peftk.accelerate("peft")
        if not report.accelerated:
            raise RuntimeError(f"nothing is accelerated:\n{report}")


def unpacked(folder: Path) -> Path:
    """Return the tests of the installed version of PEFT, downloaded once."""
    name = f"peft-{version('peft')}"
    tests = folder / name / "tests"
    if not tests.is_dir():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*download, "--no-binary", "peft", "--dest", folder, f"peft=={version('peft')}"], check=True)
        with tarfile.open(next(folder.glob(f"{name}.tar.gz"))) as archive:
            inside = [member for member in archive.getmembers() if member.name.startswith(f"{name}/tests/")]
            archive.extractall(folder, inside, filter="data")
        # They import each other relatively.
        (tests / "__init__.py").touch()
    return tests


def run(tests: Path, switch: str, results: Path, workers: int, select: str) -> dict[str, str]:
    """Run the tests, with one of the plugins switched on, and return how each of them ended."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **({switch: "1"} if switch else {}),
    }
    call = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "tools.peft_place",
        "-p",
        "tools.peft_tests",
        "-p",
        "no:warnings",
        "-q",
    ]
    call += ["-n", str(workers), "-k", select, f"--junitxml={results}", "--tb=line", "-r", "N"]
    call += [f"tests/{file}" for file in (FILES[:1] if switch == IN_PLACE else FILES)]
    subprocess.run(call, cwd=tests.parent, env=environment, check=False)
    return read(results, switch == IN_PLACE)


def read(results: Path, in_place: bool = False) -> dict[str, str]:
    """Return how each test of a JUnit file ended; of one that was skipped, or with peftk in place failed, why."""
    found = {}
    for case in Xml.parse(results).iter("testcase"):
        ends = [child for child in case if child.tag in ("failure", "error", "skipped")]
        end = ends[0].tag if ends else "passed"
        reason = f": {ends[0].get('message')}" if ends and (end == "skipped" or in_place) else ""
        found[f"{case.get('classname')}::{case.get('name')}"] = end + reason
    return found


def print_in_place(ends: dict[str, str]) -> int:
    """Print how tests ended that met peftk in the place of PEFT; see `tools.peft_place`."""
    kinds: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    different: Counter[str] = Counter()
    for end in ends.values():
        kind, _, said = end.partition(": ")
        feature = next((name for name, words in REFUSALS.items() if re.search(words, said)), None)
        # What is skipped because peftk has no such name, and the README does not say so, differs.
        absent = kind == "skipped" and REFUSED in said
        name = kind if kind == "passed" or (kind == "skipped" and not absent) else "different"
        if name == "different" and feature is not None:
            name = REFUSED
            refused[feature] += 1
        kinds[name] += 1
        if name == "different":
            different[re.sub(r"\d+", "#", said.partition("\n")[0])[:120]] += 1
    print(f"{len(ends)} tests: {', '.join(f'{count} {name}' for name, count in kinds.most_common())}")
    tried = kinds["passed"] + kinds["different"]
    print(f"{kinds['passed'] / max(tried, 1):.1%} of those that ask for nothing refused pass")
    for title, counts in (("refused by name", refused), ("different", different)):
        print(f"{title}:")
        for said, count in counts.most_common(40):
            print(f"{count:6} {said}")
    return int(not tried)


def main(arguments: list[str] | None = None) -> int:
    """Run the tests twice, print what differs, and return whether anything does."""
    parser = argparse.ArgumentParser(prog="python -m tools.peft_tests", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peft-tests", help="where the tests are kept")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-k", dest="select", default=f"{METHODS} and not ({OTHERS})", help="pytest's -k")
    parser.add_argument("--in-place", action="store_true", help="with peftk in the place of PEFT, custom models alone")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    tests = unpacked(options.folder.resolve())
    if options.in_place:
        return print_in_place(run(tests, IN_PLACE, tests.parent / "place.xml", options.workers, options.select))
    off, on = (
        run(tests, switch, tests.parent / f"{bool(switch)}.xml", options.workers, options.select)
        for switch in ("", SWITCH)
    )
    changed = [name for name in off.keys() | on.keys() if off.get(name) != on.get(name)]
    counts = Counter(end.partition(":")[0] for end in off.values())
    print(f"peft {version('peft')}: {len(off)} tests, {', '.join(f'{n} {end}' for end, n in sorted(counts.items()))}")
    for name in sorted(changed):
        print(f"{name}: {off.get(name)} without peftk, {on.get(name)} with it")
    print(f"{len(changed)} end otherwise with peftk")
    return int(bool(changed) or not off)


if __name__ == "__main__":
    sys.exit(main())
