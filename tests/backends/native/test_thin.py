"""The low-rank product in C++ and by torch's library: which of them runs depends on the CPU, and both are right."""

from __future__ import annotations

import pytest
import torch

import peftk
from peftk import functional as F
from peftk.kernels import native
from peftk.testing.compare import assert_close

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="needs the C++ extension")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs", "rank"), [(64, 40, 72, 3), (70, 129, 33, 16), (513, 64, 48, 32)])
@pytest.mark.parametrize("thin", [True, False], ids=["one-pass", "library"])
def test_both_ways_match_float64(thin: bool, rows: int, inputs: int, outputs: int, rank: int, gated: bool, monkeypatch):
    from peftk.kernels.native import low_rank

    ran = []
    fused = low_rank._fused
    monkeypatch.setattr(low_rank, "_fused", lambda *args: (ran.append(1), fused(*args)))
    monkeypatch.setattr(low_rank, "_THIN_RANK", 32 if thin else 0)
    monkeypatch.setattr(low_rank, "_THIN_ROWS", 64)
    torch.manual_seed(rows)
    shapes = [(rows, inputs), (rank, inputs), (outputs, rank)] + [(rank,)] * gated
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weight, grad = torch.randn(outputs, inputs), torch.randn(rows, outputs)
    with peftk.use_backend("native"):
        x, a, b, *gate = leaves
        y = F.low_rank_linear(x, weight, None, a, b, 0.5, gate=gate[0] if gated else None)
        found = torch.autograd.grad(y, leaves, grad)
    assert bool(ran) is thin
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x, a, b, *gate = exact
    hidden = x @ a.T * gate[0] if gated else x @ a.T
    true = x @ weight.double().T + 0.5 * hidden @ b.T
    assert_close(y, true, torch.float32)
    for one, other in zip(found, torch.autograd.grad(true, exact, grad.double()), strict=True):
        assert_close(one, other, torch.float32)
