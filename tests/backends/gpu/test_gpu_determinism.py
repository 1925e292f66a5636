"""Equal inputs give equal bits, every time."""

from __future__ import annotations

import pytest
from gpu_calls import BACKENDS, as_tuple, calls, require

from peftk.testing.calls import Call
from peftk.testing.compare import assert_same_bits

pytestmark = pytest.mark.cuda

REPEATS = 100


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", calls(), ids=str)
def test_hundred_repeats_give_equal_bits(call: Call, backend: str, device: str) -> None:
    arguments = call.arguments(device)
    require(call, backend, arguments)
    step = call.bind(backend, arguments)
    first = as_tuple(step())
    assert call.error(first, call.truth(arguments)) <= call.limit
    different = [0] * len(first)
    for _ in range(REPEATS):
        # One comparison on the device for each result; all of them are read once, at the end.
        for at, (found, expected) in enumerate(zip(as_tuple(step()), first, strict=True)):
            different[at] = different[at] + (found != expected).sum()
    assert [int(number) for number in different] == [0] * len(first)
    for found, expected in zip(as_tuple(step()), first, strict=True):
        assert_same_bits(found, expected)
