"""PEFT's own tests with peftk in its place: what counts as refused is what the README says, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import peft_tests

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


@pytest.mark.parametrize("feature", peft_tests.REFUSALS)
def test_the_readme_names_what_is_refused(feature: str) -> None:
    paragraph = next(part for part in README.split("\n\n") if "Refused by name are" in part)
    assert feature in " ".join(paragraph.split())


def test_what_is_absent_without_being_named_is_different(capsys: pytest.CaptureFixture[str]) -> None:
    ends = {
        "a": "passed",
        "b": "skipped: refused by name: hotswap_adapter",
        "c": "skipped: refused by name: RoadConfig",
        "d": "skipped: needs a GPU",
        "e": "failure: ValueError: use_dora: module 'conv2d' is a convolution with groups=8; DoRA needs groups=1",
        "f": "failure: NotImplementedError: somewhere",
    }
    assert peft_tests.print_in_place(ends) == 0
    said = capsys.readouterr().out
    assert "6 tests: 2 different, 2 refused by name, 1 passed, 1 skipped" in said
    assert "33.3% of those that ask for nothing refused pass" in said
