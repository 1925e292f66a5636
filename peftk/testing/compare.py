"""How far a result may be from the float64 truth: the only place where tolerances stand.

A result passes if its error against float64 is within `LIMITS` of its dtype, relative to the norm of the truth and,
element by element, relative to the truth's largest magnitude. Where plain PyTorch's own error in the same dtype is
known, the result must also be within twice that error plus one rounding unit. How small that error is depends on the
order in which one library adds on one machine, and below what any order may cost it is luck: it then counts as
`floor_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest relative error of a result, by the dtype in which it was computed."""

UNITS = {dtype: torch.finfo(dtype).eps for dtype in LIMITS}
"""One rounding unit of each dtype."""


def floor_of(dtype: torch.dtype, terms: int = 1) -> float:
    """Return the relative error that a right result may have, whatever order its sums are added in.

    It is that of correct rounding, half a unit, or for long sums that of adding one term after the other: the roundings
    of n partial sums of terms of one sign come to half a unit times sqrt(n) / 3 on average, here taken once and a half
    times. Half precision adds in float32.

    Args:
        dtype: the dtype in which the result was computed.
        terms: at most how many terms any of its sums has.
    """
    return max(UNITS[dtype] / 2, UNITS[sums_of(dtype)] / 2 * terms**0.5 / 2)


def sums_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums of a dtype are kept."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class Error:
    """Distance from the truth: relative Frobenius norm, and largest element relative to the largest of the truth."""

    norm: float
    largest: float


def error(actual: Tensor, truth: Tensor) -> Error:
    """Measure a result against the float64 truth.

    Raises:
        AssertionError: if the shapes differ.
    """
    assert actual.shape == truth.shape, f"shape: expected {tuple(truth.shape)}; got {tuple(actual.shape)}"
    if truth.numel() == 0:
        return Error(0.0, 0.0)
    # Where the truth is: a GPU subtracts gigabytes while the CPU would still be copying them.
    truth = truth.detach().double()
    difference = actual.detach().to(truth.device).double() - truth
    tiny = torch.finfo(torch.float64).tiny
    # A truth of zeros has no scale of its own: the error is then absolute.
    norm, largest = truth.norm().item(), truth.abs().max().item()
    return Error(
        difference.norm().item() / (norm if norm > tiny else 1.0),
        difference.abs().max().item() / (largest if largest > tiny else 1.0),
    )


def joined(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return one tensor as it is, and several as a flat one."""
    return result if isinstance(result, Tensor) else torch.cat([t.flatten() for t in result])


def assert_close(
    actual: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    *,
    eager: Tensor | None = None,
    terms: int = 1,
    shaken: Sequence[Tensor] = (),
    what: str = "result",
) -> None:
    """Assert that a result is as close to the float64 truth as its dtype allows.

    Args:
        actual: the result.
        truth: the same, computed in float64.
        dtype: the dtype in which the result was computed; it may differ from the dtype that it has.
        eager: the same, computed by plain PyTorch in ``dtype``; tightens the bound to twice its error.
        terms: at most how many terms any sum of the result has; see `floor_of`.
        shaken: the truth of inputs that are each off by up to a rounding unit of the sums. It shows how far the terms
            of the result cancel, which the norm of many numbers averages out, and that of a few does not.
        what: the name of the result for the message.

    Raises:
        AssertionError: if it is too far away, or not finite where the truth is.
    """
    found = error(actual, truth)
    reference = None if eager is None else error(eager, truth)
    moved = [error(each, truth) for each in shaken]
    for kind in ("norm", "largest"):
        value, limit = getattr(found, kind), LIMITS[dtype]
        if reference is not None:
            cancelling = max((getattr(each, kind) for each in moved), default=0.0) * terms**0.5 / 2
            limit = min(limit, 2 * max(getattr(reference, kind), floor_of(dtype, terms), cancelling) + UNITS[dtype])
        assert value <= limit, f"{what}: expected a relative error ({kind}) of at most {limit:.3g}; got {value:.3g}"


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Assert that two tensors are equal bit for bit, NaNs included.

    Raises:
        AssertionError: if shape, dtype or any bit differs.
    """
    assert actual.shape == expected.shape, f"{what}: expected shape {tuple(expected.shape)}; got {tuple(actual.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: expected {expected.dtype}; got {actual.dtype}"
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    left, right = actual.detach().contiguous().view(width), expected.detach().contiguous().view(width)
    differing = int((left != right).sum())
    assert differing == 0, f"{what}: expected equal bits; got {differing} of {left.numel()} elements that differ"
