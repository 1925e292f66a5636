"""Sums over tokens of half-precision activations, on ways that only large layers take: they stay float32."""

from __future__ import annotations

import pytest
import torch

import peftk
from peftk import functional as F
from peftk.testing.compare import LIMITS

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_sums_of_c3a_over_tokens_are_not_rounded_on_the_dense_way(backend):
    """One block: the product with the dense matrix costs less than the way through the frequencies."""
    x, kernel = (1 + torch.randn(2048, 128)).to(BF16), torch.zeros(1, 1, 128, requires_grad=True)
    grad = (1 + torch.randn(2048, 128)).to(BF16)
    with peftk.use_backend(backend):
        (found,) = torch.autograd.grad(F.circular_conv(x, kernel), kernel, grad)
    exact = torch.zeros(1, 1, 128, dtype=F64, requires_grad=True)
    (truth,) = torch.autograd.grad(F.circular_conv(x.double(), exact), exact, grad.double())
    # torch transforms in half precision.
    limit = LIMITS[F32 if backend == "auto" else BF16]
    assert ((found - truth).norm() / truth.norm()).item() <= limit


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_written_loha_layers_sum_over_tokens_in_float32(backend, monkeypatch):
    """Ranks of 16 and 64 tokens of 96 features: the weight is written, and its gradient contracted tile by tile."""
    from peftk.ops import _hadamard_linear

    monkeypatch.setattr(_hadamard_linear, "low_rank_pays", lambda *_: False)
    x, weight = (1 + torch.randn(640, 96)).to(BF16), torch.zeros(80, 96, dtype=BF16)
    factors = [torch.randn(shape, requires_grad=True) for shape in ((80, 16), (16, 96)) * 2]
    grad = (1 + torch.randn(640, 80)).to(BF16)
    with peftk.use_backend(backend):
        y = _hadamard_linear.hadamard_linear(x, weight, None, (0.5,), (tuple(factors),))
        found = torch.autograd.grad(y, factors, grad)
    a1, b1, a2, b2 = exact = [f.detach().double().requires_grad_() for f in factors]
    delta = (a1 @ b1) * (a2 @ b2) * 0.5
    truth = torch.autograd.grad(delta, exact, grad.double().mT @ x.double())
    for f, t in zip(found, truth, strict=True):
        assert f.dtype is F32 and ((f - t).norm() / t.norm()).item() <= LIMITS[F32]
