"""Options of the benchmarks."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.arms import QUICK, Budget


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-quick", action="store_true", help="few samples and small shapes, to try the benchmarks")
    parser.addoption("--bench-resume", metavar="FOLDER", help="leave out what a JSON file in this folder holds already")
    parser.addoption("--bench-until", metavar="SECONDS", type=float, help="begin nothing after this time of the epoch")
    parser.addoption("--bench-cells", metavar="FOLDER", help="write every comparison here as soon as it is done")


def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("--bench-until")
    if until and time.time() > until:
        pytest.skip("not measured: the time of this run was over; --resume goes on from here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick, folder = config.getoption("--bench-quick"), config.getoption("--bench-resume")
    done = set()
    if folder:
        for path in Path(folder).rglob("*.json"):
            done.update(b["fullname"] for b in json.loads(path.read_text())["benchmarks"] if "arms" in b["extra_info"])
    left_out = [i for i in items if i.nodeid in done or (quick and i.get_closest_marker("full_run"))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


NOT_MEASURED = pytest.StashKey[dict[str, str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        item.config.stash[NOT_MEASURED][item.nodeid] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr)
        item.config.stash[NOT_MEASURED][item.nodeid] = f"failed: {message.splitlines()[0][:300]}"
    return report


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    output_json["not_measured"] = config.stash[NOT_MEASURED]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_MEASURED] = {}


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> Budget:
    """How much one comparison measures."""
    return QUICK if request.config.getoption("--bench-quick") else Budget()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread, where nothing is large enough for a second one, which could only be woken up in vain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def keep_cell(request: pytest.FixtureRequest) -> Iterator[None]:
    """Save a comparison when it is done: pytest-benchmark writes its file only at the end of the session."""
    yield
    folder = request.config.getoption("--bench-cells")
    fixture = request.node.funcargs.get("benchmark")
    if folder and fixture is not None and "arms" in fixture.extra_info:
        entry = {"fullname": request.node.nodeid, "extra_info": fixture.extra_info}
        path = Path(folder) / f"{re.sub(r'[^0-9A-Za-z+-]+', '_', request.node.name)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"benchmarks": [entry]}))
