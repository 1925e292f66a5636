"""Constants are made once and kept: a CUDA graph reads them wherever they were when it was captured."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import pytest
import torch
from support.operators import CASES, forward_backward, reason_against

import peftk
from peftk.kernels.shared import fourier
from peftk.testing.cases import Case

TRANSFORMS = (fourier.transform, fourier.inverse, fourier.kernel_transform)


def keeping() -> dict[str, Callable]:
    """Return every function of the package that keeps what it returned."""
    found = {}
    for package in (peftk.kernels, peftk.ops, peftk.runtime):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                names = vars(importlib.import_module(module.name))
            except ImportError:
                continue  # the extension is not built
            found |= {f"{f.__module__}.{f.__qualname__}": f for f in names.values() if hasattr(f, "cache_parameters")}
    return found


KEEPING = keeping()


def test_nothing_kept_is_ever_dropped() -> None:
    assert any(name.endswith("fourier.transform") for name in KEEPING)
    dropping = [name for name, function in KEEPING.items() if function.cache_parameters()["maxsize"] is not None]
    assert not dropping


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
def test_a_transform_stays_where_it_is(transform: Callable) -> None:
    def made(size: int) -> torch.Tensor:
        return transform(size, torch.float32, torch.device("cpu"))

    first = made(6)
    place, value = first.data_ptr(), first.clone()
    for size in range(1, 70):
        made(size)
    assert made(6) is first and first.data_ptr() == place and torch.equal(first, value)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_call_makes_no_constant(case: Case, backend: str, dtype: torch.dtype) -> None:
    inputs = case.cast(case.inputs(), dtype, torch.float32)
    if reason := reason_against(case, inputs, backend):
        pytest.skip(reason)

    def made() -> dict[str, int]:
        with peftk.use_backend(backend):
            forward_backward(case.function, case, inputs)
        return {name: function.cache_info().misses for name, function in KEEPING.items()}

    assert made() == made()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
def test_the_first_use_of_a_transform_is_refused_while_a_graph_is_captured(
    transform: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = 7, torch.float32, torch.device("cuda", 99)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"blocks of 7 in torch.float32 on cuda:99 .* before the capture"):
        transform(*arguments)
    # What was made before is there for the graph.
    kept = torch.zeros(1)
    with monkeypatch.context() as patched:
        patched.setattr(fourier, "_planes", lambda *args: kept)
        assert transform(*arguments) is kept
    assert transform(*arguments) is kept
