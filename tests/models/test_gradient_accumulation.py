"""Gradients of parts of a batch add up to those of the batch, whatever the method."""

from __future__ import annotations

import copy

import pytest
import torch
from support.toy_model import METHODS, toy

from peftk.models.peft_model import get_peft_model
from peftk.testing.compare import assert_close

ROWS, PARTS = 12, 3
GENERATOR = torch.Generator().manual_seed(0)
BATCH = torch.randn(ROWS, 12, generator=GENERATOR)
TARGET = torch.randn(ROWS, 4, generator=GENERATOR)


def gradients(model, parts, dtype):
    """Return the gradients of the mean loss of the batch, from that many parts of it."""
    model.train()
    for x, target in zip(BATCH.to(dtype).chunk(parts), TARGET.to(dtype).chunk(parts), strict=True):
        (torch.nn.functional.mse_loss(model(x), target) / parts).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_parts_add_up(method):
    model = get_peft_model(toy(), METHODS[method])
    truth = gradients(copy.deepcopy(model).double(), 1, torch.float64)
    found = gradients(model, PARTS, torch.float32)
    assert found.keys() == truth.keys() and found
    for name, expected in truth.items():
        assert expected.abs().max() > 0 or "ranknum" in name, name
        assert_close(found[name], expected, torch.float32, what=name)


@pytest.mark.parametrize("method", METHODS)
def test_an_optimiser_with_accumulation_steps_as_with_the_batch(method):
    """The parts are run between two steps, after which the gradients are gone."""
    ends = []
    for parts in (1, PARTS):
        torch.manual_seed(1)
        model = get_peft_model(toy(), METHODS[method]).double().eval()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            for x, target in zip(BATCH.double().chunk(parts), TARGET.double().chunk(parts), strict=True):
                (torch.nn.functional.mse_loss(model(x), target) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
        ends.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in ends[0].items():
        assert_close(ends[1][name], expected, torch.float64, what=name)
