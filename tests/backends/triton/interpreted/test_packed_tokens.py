"""Tokens and blocks that share a tile of a Triton kernel, and float16 sums between two contractions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import peftk
from peftk.testing.compare import assert_close, assert_same_bits

SIZES = [(8, 8, 8, 8), (5, 7, 8, 16), (3, 2, 20, 12), (20, 20, 8, 8), (32, 3, 4, 70)]
"""(l, m, k, n) of the factors; w1 above 16 rows and columns has few tokens in a tile, or one."""


def product(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    base = torch.zeros(*x.shape[:-1], w1.shape[0] * w2.shape[0], dtype=x.dtype)
    with peftk.use_backend("triton"):
        return peftk.functional.kronecker_add(base, x, w1, w2)


def test_a_sum_beyond_float16_gives_what_it_is_multiplied_down_to() -> None:
    x = torch.zeros(9, 64, dtype=torch.float16)
    x[4, :8] = 40_000
    y = product(x, 1e-3 * torch.eye(8), torch.full((8, 8), 0.5, dtype=torch.float16))
    assert (y[4, :8] == 160.125).all()
    assert not y[4, 8:].any() and not y[:4].any() and not y[5:].any()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_beyond_float16_match_float64_forward_and_backward(sizes: tuple[int, int, int, int]) -> None:
    left, middle, rows, columns = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, middle * columns, generator=generator)
    x[3] = 40_000 * (0.5 + torch.rand(len(x[3]), generator=generator))
    grad = torch.randn(9, left * rows, generator=generator)
    grad[5] = 30_000 * (0.5 + torch.rand(len(grad[5]), generator=generator))
    grad[3] *= 1e-4
    # Small factors, so that every gradient is finite: that of w2 is in float16, too.
    w1 = 1e-4 * (0.5 + torch.rand(left, middle, generator=generator))
    w2 = (1 + torch.rand(rows, columns, generator=generator)) / 2
    x, grad, w2 = x.half(), grad.half(), w2.half()
    # float16 holds w1 to half a unit; the truth starts from what it holds.
    w1 = w1.half().float()
    leaves = [t.requires_grad_() for t in (x, w1, w2)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = exact[0] @ torch.kron(exact[1], exact[2]).mT
    assert truth.abs().max() < 65_504 and (x.detach().double().view(9, middle, columns) @ exact[2].mT).max() > 65_504
    y = product(*leaves)
    assert_close(y, truth, torch.float16, what="output")
    wanted = torch.autograd.grad(truth, exact, grad.double())
    with peftk.use_backend("triton"):
        grads = torch.autograd.grad(y, leaves, grad)
    for name, found, want in zip(("x", "w1", "w2"), grads, wanted, strict=True):
        assert want.abs().max() < 65_504 or found.dtype is torch.float32, f"d{name} of this test does not fit"
        assert_close(found, want, torch.float16, what=f"d{name}")


@pytest.mark.parametrize("unusual", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_one_number_that_is_not_finite_spoils_its_token_alone(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, unusual: float
) -> None:
    left, middle, rows, columns = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, middle * columns, generator=generator).to(dtype)
    w1, w2 = torch.randn(left, middle, generator=generator), torch.randn(rows, columns, generator=generator).to(dtype)
    expected = product(x, w1, w2)
    x[4, columns // 2] = unusual
    y = product(x, w1, w2)
    assert not y[4].isfinite().any()
    others = torch.arange(9) != 4
    assert_same_bits(y[others], expected[others])
