"""The table in docs/formats.md is what a run of every entry gives."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")
pytest.importorskip("lycoris")
pytest.importorskip("diffusers")

from tools import format_table


def test_the_page_is_up_to_date():
    assert format_table.main(["--check"]) == 0, "run: python -m tools.format_table"


def test_wrong_outputs_get_no_entry(monkeypatch):
    def wrong(subject, path):
        return 2 * format_table._by_peftk(subject, path)

    program = format_table.Program("wrong", "kohya", None, wrong)
    with pytest.raises(AssertionError, match="expected a relative error"):
        format_table.entry("LoRA", "linear", program)
