"""Another current device, another stream, and bad input on CUDA tensors."""

from __future__ import annotations

import pytest
import torch
from gpu_calls import BACKENDS, as_tuple, calls, require

import peftk
from peftk.testing.calls import Call
from peftk.testing.compare import assert_close, assert_same_bits

pytestmark = pytest.mark.cuda

BF16_OR_CAYLEY = [c for c in calls() if c.dtype is torch.bfloat16 or c.forward == "cayley"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", BF16_OR_CAYLEY, ids=str)
def test_tensors_on_a_device_that_is_not_the_current_one(call: Call, backend: str, device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices; this machine has one")
    arguments = call.arguments(f"{device}:1")
    require(call, backend, arguments)
    assert torch.cuda.current_device() == 0
    found = as_tuple(call.bind(backend, arguments)())
    assert torch.cuda.current_device() == 0
    assert {result.device.index for result in found} == {1}
    assert call.error(found, call.truth(arguments)) <= call.limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", BF16_OR_CAYLEY, ids=str)
def test_kernels_run_on_the_current_stream(call: Call, backend: str, device: str) -> None:
    """Inputs become right late on a side stream: a kernel on any other stream would read zeros."""
    arguments = call.arguments(device)
    require(call, backend, arguments)
    step = call.bind(backend, arguments)
    expected = [result.clone() for result in as_tuple(step())]
    late = tuple(torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for target, source in zip(late, arguments, strict=True):
            if isinstance(target, torch.Tensor):
                target.copy_(source)
        found = as_tuple(call.bind(backend, late)())
    side.synchronize()
    for result, right in zip(found, expected, strict=True):
        assert_same_bits(result, right)


F = peftk.functional


def test_tensors_on_two_devices_are_refused_by_name(device: str) -> None:
    x, weight, blocks = torch.ones(2, 8), torch.ones(4, 8), torch.ones(2, 4, 4)
    a, b = torch.ones(2, 8), torch.ones(4, 2)
    there = {"x": x, "weight": weight, "blocks": blocks, "a": a, "b": b}
    there = {name: value.to(device) for name, value in there.items()}
    with pytest.raises(ValueError, match=r"blocks: expected a tensor on cuda:0, as x is; got one on cpu"):
        F.block_rotate(there["x"], blocks)
    with pytest.raises(ValueError, match=r"weight: expected a tensor on cuda:0, as x is; got one on cpu"):
        F.block_rotate_linear(there["x"], weight, None, there["blocks"])
    with pytest.raises(ValueError, match=r"a: expected a tensor on cuda:0, as x is; got one on cpu"):
        F.low_rank_linear(there["x"], there["weight"], None, a, there["b"])
    with pytest.raises(ValueError, match=r"base: expected a tensor on cuda:0, as x is; got one on cpu"):
        F.low_rank_add(torch.ones(2, 4), there["x"], there["a"], there["b"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype, device: str) -> None:
    x = torch.ones(2, 8, device=device).to(dtype)
    with pytest.raises(TypeError, match="x: expected dtype float64, float32, bfloat16 or float16"):
        F.block_rotate(x, torch.ones(2, 4, 4, device=device))


def stepped_down(explanation: peftk.runtime.registry.Explanation) -> None:
    """Assert that every backend that cannot run says why, and that one can."""
    assert explanation.chosen is not None
    for candidate in explanation.candidates:
        assert candidate.reason is None or len(candidate.reason.split()) >= 4, str(explanation)


# Sizes and dtypes that some kernel does not take: whichever backend runs, the result is right.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 3, 7, 24, 65, 130])
def test_unusual_block_sizes(size: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(37, 4 * size, generator=generator, device=device).to(dtype)
    packed = 0.3 / size * torch.randn(4, size * (size - 1) // 2, generator=generator, device=device)
    for terms in (None, 5):
        stepped_down(peftk.explain("cayley", packed, size, neumann_terms=terms))
        blocks = F.cayley(packed, size, neumann_terms=terms)
        truth = F.cayley(packed.double().cpu(), size, neumann_terms=terms)
        assert_close(blocks, truth, torch.float32, what="blocks")
    stepped_down(peftk.explain("block_rotate", x, blocks))
    truth = F.block_rotate(x.double().cpu(), blocks.double().cpu())
    assert_close(F.block_rotate(x, blocks), truth, dtype if dtype is not torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 17, 257])
def test_unusual_ranks(rank: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, spread: float) -> torch.Tensor:
        return (spread * torch.randn(shape, generator=generator, device=device)).to(dtype)

    x, base = normal(37, 100, spread=1.0), normal(37, 60, spread=1.0)
    a, b = normal(rank, 100, spread=0.1), normal(60, rank, spread=rank**-0.5)
    stepped_down(peftk.explain("low_rank_add", base, x, a, b))
    truth = F.low_rank_add(*(t.double().cpu() for t in (base, x, a, b)))
    assert_close(F.low_rank_add(base, x, a, b), truth, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_named_backend_that_cannot_run_says_why(backend: str, device: str) -> None:
    x, blocks = torch.ones(2, 8, device=device, dtype=torch.float64), torch.ones(2, 4, 4, device=device).double()
    reason = next(c.reason for c in peftk.explain("block_rotate", x, blocks).candidates if c.backend == backend)
    assert reason is not None, "no kernel takes float64"
    with peftk.use_backend(backend), pytest.raises(RuntimeError, match="backend: expected one that can run"):
        F.block_rotate(x, blocks)
