"""Whether a tensor holds the bits that it had: some microseconds for what an adapter has, where ``torch.equal`` takes
ten times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C  # noqa: F401 - importing it registers the operators of peftk_native
from .few_rows import SUM_WORDS

same_bits = torch.ops.peftk_native.same_bits.default
"""``same_bits(source, kept)`` of a contiguous CPU tensor and what `kept_bits` returned for it before."""

_piece_sums = torch.ops.peftk_native.piece_sums.default

_PIECE = 1024
"""Numbers that have a checksum of their own, in C++ too; of fewer a copy is kept."""


def kept_bits(source: Tensor) -> Tensor:
    """Return what tells later whether a tensor still holds its bits: a copy, or checksums of what is larger.

    To read these takes less time and memory than a copy. A write to one number is always found, and one to many is
    missed in one case of four thousand million.

    Args:
        source: A contiguous CPU tensor. It has checksums in float32 and bfloat16.
    """
    if source.numel() <= _PIECE or source.dtype not in (torch.float32, torch.bfloat16):
        return source.detach().clone()
    sums = torch.empty(1 + -(-source.numel() // _PIECE), SUM_WORDS, dtype=torch.int32)
    _piece_sums(source.detach(), sums)
    return sums
