"""The cheap checks of arguments beside the thorough ones: they agree on every call, and legal calls need no other.

A function `_fits_<name>` of `peftk.ops` says whether arguments are right, and `_check_<name>` beside it what is wrong.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operators import CASES
from torch import Tensor

from peftk import ops
from peftk.testing.cases import Case, Inputs

MODULES = [importlib.import_module(f"peftk.ops.{module.name}") for module in pkgutil.iter_modules(ops.__path__)]
FAST: dict[str, Callable[..., bool]] = {
    f"{function.__module__}.{name}": function
    for module in MODULES
    for name, function in vars(module).items()
    if name.startswith("_fits_") and function.__module__ == module.__name__
}


def thorough(fast: Callable) -> Callable:
    """Return the check that says what is wrong."""
    return getattr(inspect.getmodule(fast), fast.__name__.replace("_fits_", "_check_"))


@functools.cache
def legal_inputs(fast: Callable) -> list[Inputs]:
    """Return the arguments of all cases that have those of a check."""
    names = inspect.signature(fast).parameters
    found = []
    for case in CASES:
        inputs = case.cast(case.inputs(), torch.float32)
        if names.keys() <= inputs.keys():
            found.append({name: inputs[name] for name in names})
    return found


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "none": lambda value: None,
    "list": lambda value: value.tolist(),
    "integers": lambda value: value.long(),
    "half": lambda value: value.half(),
    "complex": lambda value: value.to(torch.complex64),
    "sparse": lambda value: value.to_sparse() if value.dim() else value,
    "nested": lambda value: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "elsewhere": lambda value: value.to("meta"),
    "trained": lambda value: value.detach().clone().requires_grad_(),
    "without dimensions": lambda value: value.new_ones(()),
    "flat": lambda value: value.reshape(-1),
    "one dimension more": lambda value: value[None],
    "one dimension less": lambda value: value[0] if value.dim() and len(value) else value,
    "transposed": lambda value: value.transpose(0, -1) if value.dim() else value,
}
SIZES = st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 3, 4, 6]))


def resized(value: Tensor, axis: int, size: int) -> Tensor:
    if axis >= value.dim():
        return value
    return value.new_ones(*value.shape[:axis], size, *value.shape[axis + 1 :])


@pytest.mark.parametrize("name", FAST)
def test_both_checks_take_the_same_arguments(name: str) -> None:
    fast = FAST[name]
    assert list(inspect.signature(fast).parameters) == list(inspect.signature(thorough(fast)).parameters)


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_fast_check_takes_what_the_thorough_one_takes(name: str, data: st.DataObject) -> None:
    fast = FAST[name]
    inputs = dict(data.draw(st.sampled_from(legal_inputs(fast))))
    for _ in range(data.draw(st.integers(0, 2))):
        argument = data.draw(st.sampled_from(sorted(inputs)))
        value = inputs[argument]
        # What is no ordinary tensor any more is not changed again.
        if (
            not isinstance(value, Tensor)
            or value.is_nested
            or value.is_sparse
            or value.is_meta
            or not value.is_floating_point()
        ):
            continue
        change = data.draw(st.sampled_from(sorted(CHANGES)) | SIZES)
        inputs[argument] = CHANGES[change](value) if isinstance(change, str) else resized(value, *change)
    try:
        thorough(fast)(**inputs)
        right = True
    except (TypeError, ValueError):
        right = False
    assert fast(**inputs) == right


@pytest.mark.parametrize("case", CASES, ids=str)
def test_legal_calls_take_the_fast_way(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: object) -> None:
        raise AssertionError("a legal call was checked the slow way")

    for fast in FAST.values():
        monkeypatch.setattr(inspect.getmodule(fast), thorough(fast).__name__, slow)
    case.function(**case.cast(case.inputs(), torch.float32))


def test_there_are_fast_checks() -> None:
    families = {name.split(".")[2] for name in FAST}
    assert families >= {"block_diagonal", "hadamard", "kronecker", "low_rank"}
