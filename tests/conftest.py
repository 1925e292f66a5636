"""The device that the tests run on, and the interpreter that they may run under."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# These need the interpreter, which is chosen when a process starts: test_triton_interpreted.py starts one.
collect_ignore = [] if INTERPRETED else ["backends/triton/interpreted"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the operators' tests: cpu (default), cuda or cuda:N")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda":
        # cuBLAS reads this when it starts; without it the tests of determinism would test its workspaces.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--device: expected one that torch can use; got {device}, and torch sees no GPU")
    if INTERPRETED:
        import peftk.testing.triton_interpreter  # noqa: F401 - mends the interpreter


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device that the operators' tests run on."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of three saved experts of X-LoRA, by name."""
    from support.xlora_models import EXPERTS, llama, save_experts

    return save_experts(llama(), EXPERTS, tmp_path_factory.mktemp("experts"))


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The messages that peftk logs."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("peftk"), Listener()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield said
    logger.removeHandler(handler)
    logger.setLevel(level)
