"""Tensors of more than 2^31 elements: offsets that a 32-bit integer cannot hold."""

from __future__ import annotations

import pytest
import torch
from gpu_calls import BACKENDS

import peftk
from peftk.testing.compare import assert_close

pytestmark = pytest.mark.cuda

FEATURES, TAIL = 4096, 70
TOKENS = 2**31 // FEATURES + TAIL
GIB = 2**30
F = peftk.functional


@pytest.fixture
def memory(device: str) -> None:
    """Skip where the six large tensors, with room for workspaces, do not fit."""
    torch.cuda.empty_cache()
    need = 6 * TOKENS * FEATURES * 2 + 2 * GIB
    free, _ = torch.cuda.mem_get_info()
    if free < need:
        pytest.skip(f"needs {need / GIB:.0f} GiB of free device memory; {free / GIB:.0f} GiB are free")


def tail_only(width: int, device: str) -> torch.Tensor:
    """Return bf16 rows that are zero but for the last ones, whose offsets are beyond 2^31."""
    x = torch.zeros(TOKENS, width, device=device, dtype=torch.bfloat16)
    x[-TAIL:] = torch.randn(TAIL, width, device=device, generator=torch.Generator(device).manual_seed(0))
    return x


def run(backend: str, operator: str, inputs: dict, wanted: tuple[str, ...], grad: torch.Tensor) -> dict:
    """Run a function forward and backward on a named backend."""
    if reason := next(c.reason for c in peftk.explain(operator, **inputs).candidates if c.backend == backend):
        pytest.skip(f"{backend}: {reason}")
    for name in wanted:
        inputs[name].requires_grad_()
    with peftk.use_backend(backend):
        y = getattr(F, operator)(**inputs)
        grads = torch.autograd.grad(y, [inputs[name] for name in wanted], grad)
    return {"output": y.detach(), **{f"d{name}": g for name, g in zip(wanted, grads, strict=True)}}


def truth_of_tail(
    operator: str, inputs: dict, rows: tuple[str, ...], wanted: tuple[str, ...], grad: torch.Tensor
) -> dict:
    """Compute the last rows in float64: all other rows add nothing to the gradients of the parameters."""
    exact = {k: (v.detach()[-TAIL:] if k in rows else v.detach()).double() for k, v in inputs.items()}
    for name in wanted:
        exact[name].requires_grad_()
    with peftk.use_backend("torch"):
        y = getattr(F, operator)(**exact)
        grads = torch.autograd.grad(y, [exact[name] for name in wanted], grad[-TAIL:].double())
    return {"output": y.detach(), **{f"d{name}": g for name, g in zip(wanted, grads, strict=True)}}


def compare(found: dict, truth: dict, rows: tuple[str, ...]) -> None:
    for name, expected in truth.items():
        actual = found[name]
        if name == "output" or name[1:] in rows:
            assert not actual[:-TAIL].any(), f"{name}: rows of zeros gave something"
            actual = actual[-TAIL:]
        assert_close(actual, expected, torch.bfloat16, what=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [8, 32, 256])
def test_block_rotate(size: int, backend: str, device: str, memory: None) -> None:
    generator = torch.Generator(device).manual_seed(1)
    blocks = size**-0.5 * torch.randn(FEATURES // size, size, size, device=device, generator=generator)
    inputs, grad = {"x": tail_only(FEATURES, device), "blocks": blocks}, tail_only(FEATURES, device)
    assert inputs["x"].numel() > 2**31
    found = run(backend, "block_rotate", inputs, ("x", "blocks"), grad)
    compare(found, truth_of_tail("block_rotate", inputs, ("x",), ("x", "blocks"), grad), ("x",))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", ["x", "base"])
def test_low_rank_add(wide: str, backend: str, device: str, memory: None) -> None:
    features, out = (FEATURES, 64) if wide == "x" else (64, FEATURES)
    generator = torch.Generator(device).manual_seed(1)
    a = features**-0.5 * torch.randn(16, features, device=device, generator=generator)
    b = 0.25 * torch.randn(out, 16, device=device, generator=generator)
    inputs = {"base": tail_only(out, device), "x": tail_only(features, device), "a": a, "b": b}
    grad = tail_only(out, device)
    assert inputs[wide].numel() > 2**31
    found = run(backend, "low_rank_add", inputs, ("x", "a", "b"), grad)
    truth = truth_of_tail("low_rank_add", inputs, ("base", "x"), ("x", "a", "b"), grad)
    compare(found, truth, ("base", "x"))
