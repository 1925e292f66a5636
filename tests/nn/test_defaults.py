"""torch's default dtype and default device are the user's: no result depends on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from support.dropping import DROPPED, batch, dropping
from support.layer_cases import CASES as LAYERS
from support.layer_cases import example, make
from support.operators import DTYPES, ONE_EACH, forward_backward

import peftk
from peftk.kernels.shared import fourier
from peftk.testing.cases import Case
from peftk.testing.compare import assert_same_bits


@contextlib.contextmanager
def other_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def other_device() -> contextlib.AbstractContextManager:
    # What is made there by mistake holds nothing, and meets tensors of another device.
    return torch.device("meta")


OTHER = pytest.mark.parametrize("other", [other_dtype, other_device])


@OTHER
@pytest.mark.parametrize("dtype", ["f32", "bf16-f32"])
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("case", ONE_EACH.values(), ids=str)
def test_an_operator_does_not_see_them(case: Case, backend: str, dtype: str, other) -> None:
    inputs = case.cast(case.inputs(), *DTYPES[dtype])
    with peftk.use_backend(backend):
        y, grads, grad = forward_backward(case.function, case, inputs)
        for tables in (fourier.transform, fourier.inverse, fourier.kernel_transform, fourier.waves):
            tables.cache_clear()
        with other():
            again, again_grads, _ = forward_backward(case.function, case, inputs, grad)
    assert_same_bits(again, y)
    for name, found in again_grads.items():
        assert_same_bits(found, grads[name], what=f"d{name}")


def trained(layer, x):
    torch.manual_seed(0)
    y = layer(x)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return y, *torch.autograd.grad(y, parameters, torch.ones_like(y))


def assert_same_training(layer, x, other) -> None:
    expected = trained(layer, x)
    with other():
        found = trained(layer, x)
    for one, reference in zip(found, expected, strict=True):
        assert_same_bits(one, reference)


@OTHER
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_does_not_see_them(name: str, other) -> None:
    x = example(LAYERS[name])
    # Enough rows for every kernel.
    assert_same_training(make(LAYERS[name]), x if x.dim() == 1 else torch.cat([x] * 40), other)


@pytest.mark.parametrize(("name", "field"), DROPPED)
def test_dropout_draws_on_the_cpu(name: str, field: str) -> None:
    assert_same_training(dropping(name, **{field: 0.5}), batch(name), other_device)
