"""The extension that this process imports holds CUDA C++ kernels for the device under test."""

from __future__ import annotations

import pytest
import torch

from peftk.kernels.native import unavailable
from peftk.testing.calls import Call

pytestmark = pytest.mark.cuda


def test_the_extension_is_there(device: str) -> None:
    assert unavailable() is None, unavailable()


# Calls that the C++ kernels were written for: here a reason is a failure, not a skip.
@pytest.mark.parametrize("suffix", ["", "_backward"])
@pytest.mark.parametrize(
    "call",
    [
        Call("block_rotate", 256, 512, 512, 8, torch.bfloat16),
        Call("block_rotate", 256, 512, 512, 8),
        Call("cayley", 0, 512, 512, 32),
        Call("cayley", 0, 512, 512, 64),
    ],
    ids=str,
)
def test_cuda_kernels_take_calls(call: Call, suffix: str, device: str) -> None:
    call = Call(call.operator + suffix, call.tokens, call.features, call.out, call.size, call.dtype)
    arguments = call.arguments(device)
    assert call.reason("native", arguments) is None
    assert call.error(call.bind("native", arguments)(), call.truth(arguments)) <= call.limit


def test_triton_takes_calls(device: str) -> None:
    for operator in ("block_rotate", "low_rank_linear", "low_rank_add"):
        call = Call(operator, 64, 64, 64, 16, torch.bfloat16)
        assert call.reason("triton", call.arguments(device)) is None
