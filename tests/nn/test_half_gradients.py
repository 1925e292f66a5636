"""Gradients of float32 parameters on half-precision layers: sums over tokens are never rounded to half precision."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.layer_cases import CASES, TURNING, example, make, reference, with_hook

import peftk
from peftk.nn import LoraConfig
from peftk.testing.compare import LIMITS

HALVES = [torch.bfloat16, torch.float16]
# Incoming gradients and inputs: some whose products float16 has no number for, and some that it rounds to zero.
SCALES = {"ordinary": (1.0, 1.0), "small": (1e-5, 1.0), "large": (8.0, 4.0)}


def gradients(name, dtype, backend, scale, hook=False):
    """Return the gradients of the parameters of a case, and the true ones."""
    case = CASES[name]
    of_grad, of_x = SCALES[scale]
    layer = make(case, dtype=dtype)
    if hook:
        with_hook(layer)
    torch.manual_seed(1)
    shape = tuple(example(case).shape)
    x = example(case, shape if case.base == "embedding" else (256, *shape[1:]))
    if x.is_floating_point():
        # Of one sign: the sums over tokens do not cancel, and are large.
        x = (x.abs() * of_x).to(dtype)
    params = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert all(p.dtype is torch.float32 for p in params.values())
    with peftk.use_backend(backend) if backend == "torch" else contextlib.nullcontext():
        y = layer(x)
        grad = ((1 + torch.randn(y.shape)) * of_grad).to(y.dtype)
        found = torch.autograd.grad(y, list(params.values()), grad)
    truth = torch.autograd.grad(reference(layer, x), list(params.values()), grad.double())
    return {n: (f, t) for n, f, t in zip(params, found, truth, strict=True)}


def worst(pairs):
    return max(((f.double() - t).norm() / t.norm().clamp_min(1e-300)).item() for f, t in pairs.values())


def of_bias(name, scale):
    """How many times the output with its bias is as large as without: what is rounded, beside what is turned."""
    case = CASES[name]
    if type(case.config) not in TURNING:
        return 1.0
    base, x = make(case).base_layer, SCALES[scale][1] * example(case).abs()
    bias = base.bias.view(-1, *[1] * len(getattr(base, "kernel_size", ())))
    with torch.no_grad():
        y = base(x)
        return max(1.0, (y.norm() / (y - bias).norm()).item())


def limit(dtype, scale):
    # A few roundings of operands, each of half a unit, which do not add up over the tokens. float16 has no small
    # numbers: there an operand that is a product itself, as the gradient that a layer passes on, is off by more.
    return LIMITS[dtype] * (1 if (dtype, scale) == (torch.float16, "small") else 1 / 3)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_as_good_as_their_operands(name, dtype, backend, scale):
    pairs = gradients(name, dtype, backend, scale)
    assert all(f.dtype is torch.float32 and f.isfinite().all() for f, _ in pairs.values())
    assert worst(pairs) <= limit(dtype, scale) * of_bias(name, scale)


# A convolution whose call is observed is given the adapted weight, unless LoRA's own convolutions stand beside it: the
# gradient of that weight is the base layer's own, in half precision.
CALLED = [n for n, c in CASES.items() if c.base == "linear" or (type(c.config) is LoraConfig and c.base != "conv1d")]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CALLED)
def test_layers_whose_call_is_observed(name, dtype, scale):
    pairs = gradients(name, dtype, "auto", scale, hook=True)
    assert all(f.isfinite().all() for f, _ in pairs.values())
    assert worst(pairs) <= limit(dtype, scale)


@pytest.mark.parametrize(
    "name", ["lora", "dora", "lora_bias", "lora_conv", "lora_embedding", "lokr_full", "oft", "c3a"]
)
def test_no_gradient_was_rounded_to_half_precision(name):
    for gradient, _ in gradients(name, torch.bfloat16, "auto", "ordinary").values():
        values = gradient[gradient != 0]
        exact = (values == values.bfloat16().float()).float().mean()
        assert exact < 0.5, "most of these numbers have no more bits than bfloat16"
