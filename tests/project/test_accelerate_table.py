"""The table of versions in docs/accelerate.md is that of the fingerprints."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

from tools import accelerate_table


def test_the_page_is_up_to_date():
    assert accelerate_table.main(["--check"]) == 0, "run: python -m tools.accelerate_table"


def test_a_version_that_was_not_read_is_peft_s_own(monkeypatch):
    known = {name: dict(found) for name, found in accelerate_table.hf_peft.FINGERPRINTS.known.items()}
    known["peft.tuners.loha.layer.LoHaLayer.get_delta_weight"] = {"0": ["0.19.1"]}
    monkeypatch.setattr(accelerate_table.hf_peft.FINGERPRINTS, "known", known)
    rows = [line for line in accelerate_table.table().splitlines() if "`loha.Linear`" in line]
    assert rows == ["| loha | `loha.Linear` | accelerated | PEFT's own | PEFT's own |"]
