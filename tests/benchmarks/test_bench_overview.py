"""The page over all machine classes, and the figures of the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks import overview
from benchmarks.results import Comparison, Results


def comparison(suite: str, method: str, mode: str = "forward+backward", **samples: list[float]) -> Comparison:
    arms: dict[str, Any] = {
        name: {"status": "measured", "samples_us": values, "median_us": sorted(values)[len(values) // 2]}
        for name, values in samples.items()
    }
    info = {"suite": suite, "cell": f"{method} {mode}", "method": method, "mode": mode, "device_class": "cpu-test"}
    info |= {"processor": "Tested <CPU>", "cores": 2, "threads": 1, "date": "2026-01-01", "load_before": 1.0}
    return Comparison({**info, "load_after": 1.0, "versions": {"torch": "1"}, "reference": "hf", "arms": arms})


def results() -> Results:
    return Results(
        [
            comparison("accelerate", "lora", accelerated=[10, 10], hf=[20, 20], peftk=[10, 10]),
            comparison("accelerate", "lora", "step", accelerated=[10, 10], hf=[10, 10], peftk=[5, 5]),
            comparison("lycoris", "LoRA", accelerated=[10, 10], lycoris=[40, 40]),
            comparison("decode", "lora", "no gradients", peftk=[10, 10], hf=[30, 30], frozen=[5, 5]),
            comparison("decode", "lora", "generate 4 tokens", peftk=[10, 10], hf=[15, 15], frozen=[9, 9]),
        ],
        {},
    )


def test_gains_are_medians_by_group_and_peer() -> None:
    found = {(g.group, g.peer): (g.median, g.cells) for g in overview.gains(results())}
    assert found == {
        ("layers of PEFT, accelerated", "PEFT"): (2.0, 1),
        ("steps of PEFT models, accelerated", "PEFT"): (1.0, 1),
        ("steps of models", "PEFT"): (2.0, 1),
        ("LyCORIS's networks, accelerated", "LyCORIS"): (4.0, 1),
        ("few rows without gradients", "PEFT"): (3.0, 1),
        ("generating", "PEFT"): (1.5, 1),
    }
    assert "| x | generating | PEFT | 1.50x | 1.50x | 1.50x | 1 |" in overview.figures({"x": results()})


def test_the_page_needs_no_other_file() -> None:
    text = overview.page({"cpu-test": results(), "empty": Results([comparison("costs", "lora", peftk=[1])], {})})
    assert text.count("data:image/png;base64,") == 2 and "Tested &lt;CPU&gt;" in text
    assert not any(word in text for word in ("<script", "http://", "https://", "file:"))


def test_the_readme_has_the_figures_of_the_results() -> None:
    assert overview.main(["--check"]) == 0, "run: python -m benchmarks.overview"
    assert (Path(overview.RESULTS) / "index.html").is_file()
