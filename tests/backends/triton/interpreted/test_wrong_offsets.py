"""Offsets that nobody on the host looks at: wrong ones make every result NaN, and touch nothing outside."""

from __future__ import annotations

import pytest
import torch
from peftk.triton_kernels import grouped_low_rank

import peftk

X, BASE, GATE = torch.randn(40, 6), torch.randn(40, 5), torch.randn(40, 2)
A, B = torch.randn(3, 2, 6), torch.randn(3, 5, 2)


@pytest.mark.parametrize("ends", [[7, 3, 40], [5, 6, 41], [-1, 3, 40], [2**40, 2**41, 2**42], [40, 0, 40]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_wrong_offsets_make_every_result_nan(ends: list[int], dtype: torch.dtype) -> None:
    if dtype is torch.int32 and max(ends) > 2**31:
        ends = [2**31 - 3, 2**31 - 2, 2**31 - 1]
    offsets = torch.tensor(ends, dtype=dtype)
    with peftk.use_backend("triton"):
        y, hidden = grouped_low_rank.grouped_low_rank_add(BASE, X, A, B, offsets, GATE, 2.0)
        found = grouped_low_rank.grouped_low_rank_add_backward(
            BASE, X, hidden, A, B, offsets, GATE, 2.0, True, True, True, True
        )
    for name, result in zip(("y", "hidden", "dx", "da", "db", "dgate"), (y, hidden, *found), strict=True):
        assert result.isnan().all(), name
