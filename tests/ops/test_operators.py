"""Every operator x backend x dtype x case against the naive dense formula in float64.

On the CPU that is torch and native; with ``--device cuda`` they and triton run on the GPU; in a process with
``TRITON_INTERPRET=1`` triton alone is interpreted. The truth is always computed on the CPU.
"""

from __future__ import annotations

import itertools
import math
import os
import sys

import pytest
import torch
from support.operators import (
    CASES,
    DTYPES,
    GPU_DTYPES,
    HALVES,
    ROW_DTYPES,
    as_rows,
    call,
    forward_backward,
    leaves,
    max_dtype,
    moved,
    raw_calls,
    reason_against,
    row_count,
)
from torch import Tensor

import peftk
from peftk.runtime import registry
from peftk.testing.calls import KINDS
from peftk.testing.cases import Case, Inputs
from peftk.testing.compare import UNITS, assert_close, assert_same_bits, sums_of
from peftk.testing.memory import saved_bytes

# Pairs that must run: a skip there would hide a kernel that fell away.
MUST_RUN = {("native", "f32"), ("native", "bf16-f32")} | set(itertools.product(("torch",), GPU_DTYPES))
MUST_RUN |= {("triton", "f32"), *itertools.product(("triton",), HALVES)}
REFUSALS = {
    "native": ("float16", "float64", "exact transform takes blocks up to"),
    "triton": ("exact transform", "blocks of up to", "got square ones"),
}


def backends(config: pytest.Config) -> tuple[str, ...]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ("triton",)
    return ("torch", "native") if config.getoption("--device") == "cpu" else ("torch", "triton", "native")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = backends(metafunc.config)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", chosen)
    if "dtype" in metafunc.fixturenames and "backend" in metafunc.fixturenames:
        metafunc.parametrize("dtype", GPU_DTYPES if "triton" in chosen else DTYPES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64_formula(case: Case, backend: str, dtype: str, device: torch.device) -> None:
    activations, parameters = GPU_DTYPES[dtype]
    inputs = moved(case.cast(case.inputs(), activations, parameters), device)
    if reason := reason_against(case, inputs, backend):
        # What the C++ kernels take on a GPU is the subject of their own tests.
        if (
            backend in KINDS[case.operator].backends
            and (backend, dtype) in MUST_RUN
            and (backend != "native" or device.type == "cpu")
        ):
            assert any(known in reason for known in REFUSALS.get(backend, ())), reason
        pytest.skip(reason)
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    function = case.function
    with peftk.use_backend(backend):
        y, grads, grad = forward_backward(function, case, inputs)
    # The truth starts from the rounded inputs, and its incoming gradient from the rounded one.
    exact = moved(case.cast(inputs, torch.float64), "cpu")
    truth, true_grads, _ = forward_backward(case.formula, case, exact, grad.to(y.dtype).double())
    # The eager form of the same formula sets the bound beside the fixed limit, where it can run in this dtype.
    with peftk.use_backend("torch"):
        eager, eager_grads, _ = forward_backward(function, case, inputs)
    sums = KINDS[case.operator].sums
    computed = torch.float32 if sums == "parameters" and activations != torch.float64 else activations
    wide = torch.float32 if sums == "float32" and activations != torch.float64 else computed
    assert y.dtype == (inputs["x"].dtype if "x" in inputs else wide)
    again = shaken(case, exact, grad.to(y.dtype).double(), true_grads, computed)
    # No sum is over more than the numbers of the largest tensor.
    terms = max(t.numel() for t in (y, *inputs.values()) if isinstance(t, Tensor))
    assert_close(y, truth, computed, eager=eager if backend != "torch" else None, terms=terms, what="output")
    for name, found in grads.items():
        assert found.dtype == inputs[name].dtype, f"gradient of {name}"
        bound = None if backend == "torch" else eager_grads[name]
        coarsest = max_dtype(computed, inputs[name].dtype)
        off = [grads[name] for grads in again if name in grads]
        assert_close(found, true_grads[name], coarsest, eager=bound, terms=terms, shaken=off, what=f"d{name}")
    for name, value in before.items():
        assert_same_bits(inputs[name], value, what=f"{name} after the call")


FEW = 64
"""Below so many numbers a norm averages over nothing, and one of them may be what is left of terms that cancel."""


def shaken(
    case: Case, exact: Inputs, grad: Tensor, true_grads: dict[str, Tensor], dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """Return the gradients of few numbers, several times, of inputs that are off by up to a unit of the sums' dtype."""
    few = [name for name, value in true_grads.items() if value.numel() < FEW]
    if not few:
        return []
    generator = torch.Generator().manual_seed(2)
    unit = UNITS[sums_of(dtype)]

    def off(value: Tensor) -> Tensor:
        return value * (1 + unit * (2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1))

    found = []
    for _ in range(4):
        inputs = {k: off(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in exact.items()}
        grads = forward_backward(case.formula, case, inputs, off(grad.cpu()))[1]
        found.append({name: grads[name] for name in few})
    return found


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.gradients and c.inputs()[c.gradients[0]].numel() < 100], ids=str
)
def test_gradcheck(case: Case, backend: str, device: torch.device) -> None:
    inputs, wanted = leaves(case, moved(case.inputs(), device))
    if reason := reason_against(case, inputs, backend):
        pytest.skip(reason)

    def function(*values: Tensor) -> Tensor:
        return call(case, {**inputs, **dict(zip(wanted, values, strict=True))})

    with peftk.use_backend(backend):
        assert torch.autograd.gradcheck(function, tuple(wanted.values()), fast_mode=True)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return the same values in other layouts."""
    padded = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    padded[..., 1:-2] = x
    every_other = x.new_full((*x.shape[:-1], x.shape[-1] * 2), torch.nan)
    every_other[..., ::2] = x
    found = {"sliced": padded[..., 1:-2], "strided": every_other[..., ::2]}
    if x.dim() >= 2:
        found["transposed"] = x.transpose(0, -1).contiguous().transpose(0, -1)
        found["expanded"] = x[:1].expand(x.shape)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts(case: Case, backend: str, device: torch.device) -> None:
    """Strides change no value: every tensor in turn in another layout, and the incoming gradient too."""
    inputs = moved(case.cast(case.inputs(), torch.float32), device)
    if reason := reason_against(case, inputs, backend):
        pytest.skip(reason)
    function = case.function
    with peftk.use_backend(backend):
        for name, value in inputs.items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
                continue
            for layout, other in layouts(value).items():
                variant = {**inputs, name: other}
                plain = {**inputs, name: other.contiguous()}
                y = function(**variant)
                assert_close(y, function(**plain), torch.float32, what=f"{name} {layout}")
        if not case.gradients:
            return
        inputs, wanted = leaves(case, inputs)
        y = function(**inputs)
        grad = torch.randn_like(y)
        expected = torch.autograd.grad(y, list(wanted.values()), grad, retain_graph=True, allow_unused=True)
        for layout, other in layouts(grad).items():
            if layout == "expanded":
                continue
            found = torch.autograd.grad(y, list(wanted.values()), other, retain_graph=True, allow_unused=True)
            for name, left, right in zip(wanted, found, expected, strict=True):
                assert_close(left, right, torch.float32, what=f"d{name} with a {layout} gradient")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element_is_written(
    case: Case, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uninitialised memory is NaN: an element that a kernel forgets poisons the result."""
    inputs = moved(case.cast(case.inputs(), torch.float32), device)
    if reason := reason_against(case, inputs, backend):
        pytest.skip(reason)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    # Only this mode fills memory; what torch does without a deterministic algorithm on a GPU is not under test.
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    try:
        with peftk.use_backend(backend):
            y, grads, _ = forward_backward(case.function, case, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.isfinite().all()
    for name, found in grads.items():
        assert found.isfinite().all(), f"d{name}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_bits_every_time_and_for_any_threads(case: Case, backend: str, device: torch.device) -> None:
    inputs = moved(case.cast(case.inputs(), torch.float32), device)
    if reason := reason_against(case, inputs, backend):
        pytest.skip(reason)
    function = case.function
    threads = torch.get_num_threads()
    with peftk.use_backend(backend):
        y, grads, _ = forward_backward(function, case, inputs)
        again, grads_again, _ = forward_backward(function, case, inputs)
        assert_same_bits(again, y)
        for name in grads:
            assert_same_bits(grads_again[name], grads[name], what=f"d{name}")
        if backend != "native" or device.type != "cpu" or KINDS[case.operator].threads != "equal bits":
            return
        try:
            torch.set_num_threads(2 if threads == 1 else 1)
            other, grads_other, _ = forward_backward(function, case, inputs)
        finally:
            torch.set_num_threads(threads)
    assert_same_bits(other, y, what="output with another number of threads")
    for name in grads:
        assert_same_bits(grads_other[name], grads[name], what=f"d{name} with another number of threads")


@pytest.mark.parametrize("case", [c for c in CASES if row_count(c) > 1], ids=str)
@pytest.mark.parametrize("numbers", ROW_DTYPES)
def test_no_row_reaches_another(
    case: Case, numbers: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a row of the inputs and of the incoming gradient holds, the other rows keep every bit."""
    activations, parameters = GPU_DTYPES[numbers]
    inputs = moved(case.cast(case.inputs(), activations, parameters), device)
    if reason := reason_against(case, inputs, backend):
        pytest.skip(reason)
    rows, row = case.rows, row_count(case) // 2
    kept = torch.arange(row_count(case)) != row

    def spoilt(value: Tensor, last: int, unusual: float) -> Tensor:
        values = value.detach().clone(memory_format=torch.contiguous_format)
        as_rows(values, last)[row] = min(unusual, torch.finfo(value.dtype).max)
        # In the layout of the value, which may decide what computes.
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(values)

    # oneDNN multiplies the first number of the next row by zero where a bfloat16 row is odd: torch's defect, not ours.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with peftk.use_backend(backend):
        y, grads, grad = forward_backward(case.function, case, inputs)
        y, grad = y.detach(), grad.to(y)
        for unusual in (torch.nan, -torch.inf, sys.float_info.max):
            found = {k: spoilt(v, rows.last, unusual) if k in rows.arguments else v for k, v in inputs.items()}
            z, spoilt_grads, _ = forward_backward(case.function, case, found, spoilt(grad, rows.result, unusual))
            left, right = (as_rows(t.detach(), rows.result) for t in (z, y))
            assert_same_bits(left[kept], right[kept], what=f"the output beside a row of {unusual}")
            if math.isnan(unusual):
                # What is finite all the same does not depend on what the row holds: a series that ends before it.
                finite = left[row].isfinite()
                assert_same_bits(left[row][finite], right[row][finite], what="what is finite beside NaN")
            for name in set(grads) & set(rows.arguments):
                left, right = as_rows(spoilt_grads[name], rows.last), as_rows(grads[name], rows.last)
                assert_same_bits(left[kept], right[kept], what=f"d{name} beside a row of {unusual}")


def test_every_operator_with_rows_has_cases_of_several() -> None:
    assert {c.operator for c in CASES if row_count(c) > 1} == {c.operator for c in CASES if c.rows.arguments}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["f32", "bf16-f32"])
def test_saved_bytes_stay_in_the_budget(case: Case, dtype: str, device: torch.device) -> None:
    inputs, _ = leaves(case, moved(case.cast(case.inputs(), *DTYPES[dtype]), device))
    owned = [v for v in inputs.values() if isinstance(v, Tensor)]
    assert saved_bytes(lambda: call(case, inputs), owned) <= case.saved(inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, device: torch.device) -> None:
    calls = raw_calls(case, device)
    assert len(calls) == (2 if case.gradients else 1), "one operator forward and one backward"
    for name, args in calls:
        torch.library.opcheck(getattr(torch.ops.peftk, name).default, args)


def test_every_operator_has_cases_and_opchecks() -> None:
    covered = {c.operator for c in CASES}
    assert covered == set(peftk.functional.__all__)
    assert {n.removesuffix("_backward") for n in registry.OPERATORS} == covered
    for operator in covered:
        assert sum(c.operator == operator for c in CASES) >= 6


@pytest.mark.parametrize("name", KINDS)
def test_families_have_the_backends_that_they_name(name: str) -> None:
    """Neither fewer, nor one whose kernels nothing holds to run."""
    family = registry.OPERATORS[name].family
    for backend in registry.PACKAGES:
        module = registry.backend_module(backend, family)
        if isinstance(module, str) and "has no" not in module:
            continue  # the whole backend cannot be imported here
        assert (backend in KINDS[name].backends) == hasattr(module, name), f"backends: {backend} of {name}"
