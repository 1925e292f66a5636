"""A sample of a batch reaches no other one, in any adapted layer, whatever it holds."""

from __future__ import annotations

import pytest
import torch
from support.layer_cases import CASES, Case, example, make, with_hook

from peftk.testing.compare import assert_same_bits


def batches(case: Case) -> list[tuple[int, ...]]:
    """Return the shapes of a case that have several samples; those of an embedding hold no numbers to spoil."""
    sample = {"linear": 1, "conv1d": 1, "embedding": 9}.get(case.base)
    sample = (2 if "sequence" in case.base else 4 if "volume" in case.base else 3) if sample is None else sample
    return [shape for shape in case.shapes() if len(shape) > sample and shape[0] > 1]


BATCHED = [name for name, case in CASES.items() if batches(case)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BATCHED)
def test_no_sample_reaches_another(name: str, training: bool, fused: bool) -> None:
    case = CASES[name]
    layer = make(case).train(training)
    if not fused:
        with_hook(layer)

    def run(x: torch.Tensor, grad: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        x = x.clone().requires_grad_()
        torch.manual_seed(1)
        y = layer(x)
        grad = torch.ones_like(y) if grad is None else grad
        return y.detach(), torch.autograd.grad(y, x, grad)[0]

    for shape in batches(case):
        x = example(case, shape)
        y, dx = run(x)
        row = shape[0] // 2
        others = torch.arange(shape[0]) != row
        for unusual in (torch.nan, torch.inf, torch.finfo(torch.float32).max):
            spoilt, grad = x.clone(), torch.ones_like(y)
            spoilt[row], grad[row] = unusual, unusual
            found_y, found_dx = run(spoilt, grad)
            assert_same_bits(found_y[others], y[others], what=f"the output beside a sample of {unusual}")
            assert_same_bits(found_dx[others], dx[others], what=f"dx beside a sample of {unusual}")


def test_convolutions_are_among_them() -> None:
    assert {"linear", "conv", "pointwise"} <= {CASES[name].base for name in BATCHED}
