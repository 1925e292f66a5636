"""The designs of the fused low-rank layer that no shape chooses by itself yet, against the dense formula in float64."""

from __future__ import annotations

import pytest
import torch
from peftk.triton_kernels import _launch, low_rank, low_rank_gemm
from support.operators import forward_backward, max_dtype

import peftk
from peftk.testing.cases.low_rank import _case
from peftk.testing.compare import assert_close

CASES = [
    _case("low_rank_linear", "one-row", (1,), 64, 48, 4),
    _case("low_rank_linear", "r16", (65,), 96, 40, 16, bias=False, scale=-1.25),
    _case("low_rank_linear", "two-row-tiles", (3, 67), 72, 136, 33),
    _case("low_rank_linear", "rank-gate", (130,), 128, 64, 100, gate="rank"),
    _case("low_rank_linear", "token-gate", (9,), 64, 200, 8, gate="token"),
]
HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("design", low_rank.DESIGNS)
def test_design_matches_float64_formula(design: str, case, dtype: str) -> None:
    inputs = case.cast(case.inputs(), HALVES[dtype], torch.float32)
    # An H200's capability, and so few multiprocessors that a program of D1 takes several tiles.
    with peftk.use_backend("triton"), low_rank.use_design(design), low_rank_gemm.assume((9, 0), 2):
        y, grads, grad = forward_backward(peftk.functional.low_rank_linear, case, inputs)
    exact = case.cast(inputs, torch.float64)
    truth, true_grads, _ = forward_backward(case.formula, case, exact, grad.to(y.dtype).double())
    assert_close(y, truth, y.dtype, what="output")
    for name, found in grads.items():
        assert_close(found, true_grads[name], max_dtype(y.dtype, inputs[name].dtype), what=f"d{name}")


@pytest.mark.parametrize("design", ["D0", "D0-expand-first"])
def test_design_in_float32(design: str) -> None:
    case = CASES[1]
    inputs = case.cast(case.inputs(), torch.float32)
    with peftk.use_backend("triton"), low_rank.use_design(design):
        y, grads, grad = forward_backward(peftk.functional.low_rank_linear, case, inputs)
    truth, true_grads, _ = forward_backward(case.formula, case, case.cast(inputs, torch.float64), grad.double())
    assert_close(y, truth, torch.float32, what="output")
    for name, found in grads.items():
        assert_close(found, true_grads[name], torch.float32, what=f"d{name}")


def test_the_extended_product_runs_where_it_is_named() -> None:
    case = CASES[0]
    inputs = case.cast(case.inputs(), torch.float16)
    with peftk.use_backend("triton"), low_rank.use_design("D1"), low_rank_gemm.assume((9, 0), 2):
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        with _launch.recorded() as launches:
            peftk.functional.low_rank_linear(**meta)
    assert [launch.name for launch in launches] == ["shrink_kernel", "linear_kernel"]


def test_the_extended_product_is_refused_in_float32() -> None:
    case = CASES[0]
    inputs = case.cast(case.inputs(), torch.float32)
    with (
        peftk.use_backend("triton"),
        low_rank.use_design("D1"),
        low_rank_gemm.assume((9, 0), 2),
        pytest.raises(RuntimeError, match="'D1', which cannot"),
    ):
        peftk.functional.low_rank_linear(**inputs)
