"""Philox4x32-10 inside a kernel: the same dropout mask as every other backend, never stored.

Element i of a tensor, counted row by row, takes word ``i % 4`` of the block of (seed, ``i // 4``).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..kernels.shared.philox import dropout_threshold

KEEP_ALL = {"seed_low": 0, "seed_high": 0, "threshold": 0}
"""The arguments of a kernel that drops nothing."""


RANDOM = ["seed_low", "seed_high", "threshold"]
"""The arguments whose values must not make a kernel of their own."""


def keep_arguments(dropout_p: float, seed: Tensor) -> dict[str, int]:
    """Return what a kernel needs to know of the mask; reading the seed, a CPU tensor, waits for no GPU."""
    # Two signed halves are 32-bit arguments whatever the seed: no seed compiles a kernel of its own.
    low, high = int(seed) & 0xFFFFFFFF, int(seed) >> 32 & 0xFFFFFFFF
    low, high = (half - (half >> 31 << 32) for half in (low, high))
    return {"seed_low": low, "seed_high": high, "threshold": dropout_threshold(dropout_p)}


@triton.jit
def _words(block, seed_low, seed_high):
    """Return the four words of each block; block is int64."""
    seed = (tl.cast(seed_high, tl.int64) << 32) | (tl.cast(seed_low, tl.int64) & 0xFFFFFFFF)
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def _kept(
    rows,
    first_column,
    columns,
    seed_low,
    seed_high,
    threshold,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Say which elements of a tile are kept.

    rows: int64 row numbers, (BLOCK_ROWS,). columns: the width of the whole tensor. ALIGNED: whether the width is a
    multiple of 4; one Philox call then serves four elements, as first_column is always one.
    """
    if ALIGNED:
        offsets = first_column // 4 + tl.arange(0, BLOCK_COLUMNS // 4)  # [BLOCK_COLUMNS // 4]
        # [BLOCK_ROWS, BLOCK_COLUMNS // 4] each
        word0, word1, word2, word3 = _words(rows[:, None] * (columns // 4) + offsets[None, :], seed_low, seed_high)
        # [BLOCK_ROWS, BLOCK_COLUMNS]
        bits = tl.join(tl.join(word0, word2), tl.join(word1, word3)).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        offsets = first_column + tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
        index = rows[:, None] * columns + offsets[None, :]  # [BLOCK_ROWS, BLOCK_COLUMNS]
        word0, word1, word2, word3 = _words(index >> 2, seed_low, seed_high)  # [BLOCK_ROWS, BLOCK_COLUMNS] each
        lane = index & 3  # [BLOCK_ROWS, BLOCK_COLUMNS]
        bits = tl.where(lane < 2, tl.where(lane == 0, word0, word1), tl.where(lane == 2, word2, word3))
    return (bits >> 8).to(tl.int32) >= threshold
