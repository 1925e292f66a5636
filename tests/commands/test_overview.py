"""The overview of ``peftk``: what it can do, said without importing torch."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from peftk._overview import asked_for
from peftk.commands import COMMANDS, load, summary

PROGRAM = Path(sys.executable).with_name("peftk")
CALLS = ([sys.executable, "-X", "importtime", "-m", "peftk"], [sys.executable, "-X", "importtime", str(PROGRAM)])


@pytest.mark.parametrize("call", CALLS, ids=["module", "script"])
@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], []])
def test_no_torch_is_imported(call: list[str], arguments: list[str], tmp_path: Path) -> None:
    if call[-1] == str(PROGRAM) and not PROGRAM.is_file():
        pytest.skip("peftk is not installed as a program")
    done = subprocess.run([*call, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "peftk._overview" in imported, done.stderr[-2000:]
    assert not {name for name in imported if name.partition(".")[0] in ("torch", "numpy", "transformers")}
    expected = ["0.1."] if arguments == ["--version"] else list(COMMANDS)
    assert all(word in done.stdout for word in expected), done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_summed_up_by_its_own_first_sentence(name: str) -> None:
    assert summary(name) == inspect.getdoc(load(name)).partition("\n\n")[0] != ""


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["-m", "--help"], ["python", "-m", "peftk", "--help"], True),
        (["-m"], ["python", "-X", "dev", "-m", "peftk"], True),
        (["/usr/bin/peftk", "-h"], ["python", "/usr/bin/peftk", "-h"], True),
        # The help of one command is made of the command.
        (["-m", "bench", "--help"], ["python", "-m", "peftk", "bench", "--help"], False),
        (["/usr/bin/peftk", "doctor"], ["python", "/usr/bin/peftk", "doctor"], False),
        # Another program that imports peftk.
        (["-m", "--help"], ["python", "-m", "trainer", "--help"], False),
        (["train.py", "--help"], ["python", "train.py", "--help"], False),
        (["-c"], ["python", "-c", "import peftk"], False),
        ([""], ["python"], False),
    ],
)
def test_when_the_overview_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], orig_argv: list[str], expected: bool
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert asked_for() is expected
