"""Gradients of gradients of every operator, beside those of its float64 formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.operators import CASES, ONE_CASE, call, double, leaves
from torch import Tensor

from peftk.testing.cases import Case
from peftk.testing.compare import assert_close


def derivatives(function: Callable[..., Tensor], case: Case, order: int) -> dict[str, Tensor]:
    """Return what one gets who differentiates a weighted sum of the gradients before, `order` times in all."""
    inputs, wanted = leaves(case, double(case))
    generator = torch.Generator().manual_seed(4)
    y = function(**inputs)
    wanted["grad"] = torch.randn(y.shape, generator=generator, dtype=y.dtype).requires_grad_()
    total = (y * wanted["grad"]).sum()
    found: dict[str, Tensor] = {}
    for _ in range(order):
        grads = torch.autograd.grad(total, list(wanted.values()), create_graph=True, materialize_grads=True)
        found = dict(zip(wanted, grads, strict=True))
        weights = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in grads]
        total = sum(((g * g * weight).sum() for g, weight in zip(grads, weights, strict=True)), y.new_zeros(()))
        if not total.requires_grad:
            return {name: torch.zeros_like(g) for name, g in found.items()}
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case.gradients], ids=str)
@pytest.mark.parametrize("order", [2, 3])
def test_gradients_of_gradients_are_those_of_the_formula(case: Case, order: int) -> None:
    found = derivatives(lambda **inputs: call(case, inputs), case, order)
    for name, expected in derivatives(case.formula, case, order).items():
        assert_close(found[name], expected, torch.float64, what=f"derivative {order} in {name}")


@ONE_CASE
def test_torch_func_differentiates_twice(case: Case) -> None:
    inputs = double(case)
    name = case.gradients[0]

    def second(function: Callable[..., Tensor]) -> Tensor:
        def loss(value: Tensor) -> Tensor:
            return function(**{**inputs, name: value}).square().sum()

        return torch.func.grad(lambda value: torch.func.grad(loss)(value).square().sum())(inputs[name])

    assert_close(second(lambda **kw: call(case, kw)), second(case.formula), torch.float64)
