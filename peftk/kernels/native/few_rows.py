"""A frozen linear layer on few rows in C++: base product, adapter and gain in one pass over the weight, which also says
whether the weight is still the one that the gain was computed from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ._bare import bare
from .low_rank import _as_rows

_MULTIPLIES_BFLOAT16 = _C.multiplies_bfloat16()

ONE_PASS_ROWS = {torch.float32: 4, torch.bfloat16: 4 if _MULTIPLIES_BFLOAT16 else 32}
"""Rows of x up to which one pass over a weight of a dtype takes no longer than the product of torch's library, which
has no good one in bfloat16 where the CPU has no instructions for it. Measured on AVX-512 without these.
"""

_LARGE_WEIGHT = 1 << 20
"""Numbers of a float32 weight that does not stay in the cache of a core."""


def pays_in_one_pass(x: Tensor, weight: Tensor) -> bool:
    """Whether one pass over a weight takes no longer than the product of torch's library and one that adds onto it.

    On CPUs that multiply bfloat16 (measured with AVX-512 and AMX) that holds in float32 for more rows, of weights that
    stay in no cache, and from 16 rows on, where the library takes another kernel.
    """
    numbers, width = x.numel(), x.shape[-1]
    if numbers <= ONE_PASS_ROWS.get(x.dtype, 0) * width:
        return True
    if x.dtype is not torch.float32 or not _MULTIPLIES_BFLOAT16:
        return False
    if weight.numel() >= _LARGE_WEIGHT:
        return numbers <= 32 * width
    return 16 * width <= numbers <= 24 * width


_RESCALED_ROWS = {torch.float32: 16, torch.bfloat16: 8 if _MULTIPLIES_BFLOAT16 else 16}
"""Rows of x up to which one pass is faster that also finds out whether the weight is still the same."""


def rescaling_pays_in_one_pass(x: Tensor, weight: Tensor) -> bool:
    """Whether one pass over a weight takes no longer than its checksums and two products."""
    rows = 32 if x.dtype is torch.float32 and weight.numel() >= _LARGE_WEIGHT else _RESCALED_ROWS.get(x.dtype, 0)
    return x.numel() <= rows * x.shape[-1]


SUM_WORDS = 16
"""Words of the checksum of one row of a weight."""

low_rank = bare(torch.ops.peftk_native.few_rows_low_rank.default)
"""``low_rank(x, weight, bias, a, b, gate, scale, most)`` returns
``x @ weight.T + scale * (x @ a.T * gate) @ b.T + bias``.

It and the two below return None where the caller has to go another way: for more rows of x than `most`, for other
dtypes, shapes or layouts than the kernels take, and where the output is that of the frozen layer alone, because what is
added is zero or a rotation changes nothing, so that it keeps its bits.
"""

rotate = bare(torch.ops.peftk_native.few_rows_rotate.default)
"""``rotate(x, weight, bias, blocks, gain, sources, kept, most)`` returns ``gain * (rotated(x) @ weight.T) + bias``;
None also for `sources` of which `kept` says that they have changed.
"""

rotated = bare(torch.ops.peftk_native.few_rows_rotated.default)
"""``rotated(x, weight, blocks, most)`` returns the rows of x, in float32, rotated for the library's own product with
the weight; None as above.
"""

rescale = bare(torch.ops.peftk_native.few_rows_rescale.default)
"""``rescale(x, weight, bias, a, b, scale, gain, sums, sources, kept, most)`` returns
``gain * (x @ weight.T + scale * (x @ a.T) @ b.T) + bias``; None also where the gain may be another one by now: for a
weight that has other checksums than `sums`, and for changed `sources`.
"""

same_row_sums = torch.ops.peftk_native.same_row_sums.default
"""``same_row_sums(weight, sums)`` says whether a weight has these checksums."""

same_gain = bare(torch.ops.peftk_native.same_gain.default)
"""``same_gain(weight, sums, sources, kept)`` says whether neither the weight nor the sources have changed."""

_row_sums = torch.ops.peftk_native.row_sums.default


def row_sums(weight: Tensor) -> Tensor:
    """Return the checksum of every row of a contiguous weight, float32 or bfloat16: (rows, SUM_WORDS), int32.

    A change of one word of a row, one float32 or two neighbours in bfloat16, always changes it; other changes are
    missed in one case of four thousand million.
    """
    sums = torch.empty(weight.shape[0], SUM_WORDS, dtype=torch.int32)
    _row_sums(weight, sums)
    return sums


_low_rank = bare(torch.ops.peftk_native.low_rank_few.default)

_FACTORS_ROWS = 4
"""Rows up to which one pass over float32 factors as they lie beats the two products of torch's library."""


def add_low_rank_(out: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, scale: float) -> None:
    """Add the low-rank product of few rows onto a fresh output, in float32 whatever its dtype.

    Args:
        out: (..., out), contiguous, float32 or bfloat16.
        x: (..., in), of its dtype.
        a: (rank, in), float32, as are b and the gate; all contiguous.
        b: (out, rank).
        gate: (rank,) or None.
        scale: The factor.
    """
    if x.dtype is torch.float32 and x.numel() > _FACTORS_ROWS * x.shape[-1]:
        hidden = torch.mm(_as_rows(x), a.mT)
        _as_rows(out).addmm_(hidden if gate is None else hidden.mul_(gate), b.mT, alpha=scale)
    else:
        _low_rank(x, a, b, gate, scale, None, None, out)


def rescale_low_rank_(
    out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, gain: Tensor, bias: Tensor | None
) -> bool:
    """Add the low-rank product of few rows onto the base product, and scale the sum, about a bias.

    Args:
        out: The base product without the bias, as for `add_low_rank_`.
        x: As there.
        a: As there.
        b: As there.
        scale: The factor of the product.
        gain: That of the sum, (out,), float32.
        bias: What is added then, (out,), in the dtype of x, or None.

    Returns:
        False, and nothing is done, where b is zero: the caller knows better what the frozen layer's bits are.
    """
    done: bool = _low_rank(x, a, b, None, scale, gain, bias, out)
    return done
