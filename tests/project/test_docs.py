"""What the documents show must run, and what they link to must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import peftk

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
WITH_CODE = [p for p in PAGES if "```python" in p.read_text()]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", WITH_CODE, ids=name)
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": "__main__"}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL), 1):
        exec(compile(block, f"{name(path)}, block {number}", "exec"), scope)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in PAGES:
        for target in re.findall(r"`?make ([a-z]+)`", path.read_text()):
            assert target in targets, f"{name(path)}: make {target}"


@pytest.mark.parametrize("operator", peftk.functional.__all__)
def test_every_operator_stands_in_the_table_of_the_readme(operator):
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| [")]
    assert any(f"`{operator}`" in row.split("|")[1] for row in rows), "README.md, the table of operators"


@pytest.mark.parametrize("kind", dict.fromkeys(layer.config_class for layer in peftk.nn.LAYERS))
def test_every_method_has_a_section(kind):
    headings = re.findall(r"^## (.*)$", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
    title = kind._forms[0].name.partition(",")[0]
    assert title in headings, f"docs/methods.md: no section {title}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_prose_is_wrapped_as_code_is(path):
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for line in prose.splitlines():
        assert len(line) <= 120 or line.startswith("|"), line
