"""Options of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.arms import QUICK, Budget


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-quick", action="store_true", help="few samples and small shapes, to try the benchmarks")
    parser.addoption("--bench-resume", metavar="FOLDER", help="leave out what a JSON file in this folder holds already")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick, folder = config.getoption("--bench-quick"), config.getoption("--bench-resume")
    done = set()
    if folder:
        for path in Path(folder).glob("*.json"):
            done.update(b["fullname"] for b in json.loads(path.read_text())["benchmarks"] if "arms" in b["extra_info"])
    left_out = [i for i in items if i.nodeid in done or (quick and i.get_closest_marker("full_run"))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full_run: left out of a quick run")


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> Budget:
    """How much one comparison measures."""
    return QUICK if request.config.getoption("--bench-quick") else Budget()
