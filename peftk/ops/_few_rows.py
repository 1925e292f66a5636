"""The low-rank product for few rows that record nothing, as generating a token at a time does: without ceremony.

An operator's way through checks, autograd and the choice of a backend takes longer than a row's own arithmetic. Here
one call reads the weight once, for the base product and what is added to it; or the base product is torch's own, and
what is added costs a call or two. Sums and factors are in float32 whatever the dtype of the activations.

Callers have asked `unobserved` whether anybody listens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..runtime import registry

FEW = 63
"""Rows up to which this is the faster way; beyond, the operators gain more than they cost."""

_DTYPES = (torch.float32, torch.bfloat16)

ORDINARY = (Tensor, nn.Parameter)
"""The classes of what is no tensor of somebody's own."""


def few(x: Tensor, features: int, most: int = FEW) -> bool:
    """Whether x has so few rows of so many features that this way is the faster one, in a dtype that it has."""
    if type(x) not in ORDINARY or not x.is_cpu or not 0 < x.numel() <= most * features or x.dtype not in _DTYPES:
        return False
    return module_of("few_rows") is not None


def usual(x: Tensor, *factors: Tensor) -> bool:
    """Whether x has few rows and all are what this way takes: contiguous, and factors in float32."""
    if not few(x, x.shape[-1]) or not x.is_contiguous():
        return False
    return all(factor.dtype is torch.float32 and factor.is_contiguous() for factor in factors)


def module_of(family: str) -> Any:
    """Return the native kernels of a family, or None where there are none."""
    module = registry.backend_module("native", family)
    return None if isinstance(module, str) else module


def rows_of_one_pass(dtype: torch.dtype) -> int:
    """Return how many rows are read with a weight of any size in one pass."""
    module = module_of("few_rows")
    rows: int = 0 if module is None else module.ONE_PASS_ROWS.get(dtype, 0)
    return rows


def pays_in_one_pass(x: Tensor, weight: Tensor) -> bool:
    """Whether one pass over this weight is the faster way; native kernels are there."""
    pays: bool = module_of("few_rows").pays_in_one_pass(x, weight)
    return pays


def low_rank_few(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Any, gate: Tensor | None
) -> Tensor | None:
    """Return ``linear(x, weight, bias) + scale * (x @ a.T * gate) @ b.T``, or None where the operators have to run.

    Where b is zero, the output keeps every bit of the frozen layer's.

    Args:
        x: (..., in), in the dtype of the weight; no gradient is recorded.
        weight: (out, in).
        bias: (out,) or None.
        a: (rank, in).
        b: (out, rank).
        scale: A number; operators take a tensor.
        gate: Of `rank` numbers, or None.
    """
    features = x.shape[-1]
    if type(x) not in ORDINARY or not x.is_cpu or x.numel() > FEW * features or type(scale) is not float:
        return None
    module = module_of("few_rows")
    if module is None:
        return None
    if module.pays_in_one_pass(x, weight):
        y: Tensor | None = module.low_rank(x, weight, bias, a, b, gate, scale, FEW)
        if y is not None:
            return y
    if (
        not few(x, features)
        or not (a.dtype is b.dtype is torch.float32)
        or (gate is not None and (gate.dtype is not torch.float32 or gate.numel() != a.shape[0]))
        or a.shape[0] == 0
        or a.shape[1] != features
        or b.shape[0] != weight.shape[0]
        or not (x.is_contiguous() and a.is_contiguous() and b.is_contiguous())
    ):
        return None
    y = linear(x, weight, bias)
    module.add_low_rank_(y, x, a, b, None if gate is None else gate.view(-1), scale)
    return y


def rescaled_few(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    gain: Tensor,
    sums: Tensor,
    sources: Sequence[Tensor],
    kept: Sequence[Tensor],
) -> Tensor | None:
    """Return ``gain * (x @ weight.T + scale * (x @ a.T) @ b.T) + bias`` in one pass over the weight, or None.

    None also where the gain may be another one by now.

    Args:
        x: (..., in), in the dtype of the weight; no gradient is recorded.
        weight: (out, in).
        bias: (out,) or None.
        a: (rank, in).
        b: (out, rank).
        scale: A number.
        gain: (out,).
        sums: The checksums of the weight that the gain was computed from.
        sources: The other tensors that it was computed from.
        kept: What tells whether these have changed since.
    """
    module = module_of("few_rows")
    if type(x) not in ORDINARY or not x.is_cpu or module is None:
        return None
    y: Tensor | None = module.rescale(x, weight, bias, a, b, scale, gain, sums, sources, kept, FEW)
    return y


def rescaled_in_one_pass(x: Tensor, weight: Tensor) -> bool:
    """Whether `rescaled_few` is the faster way for so few rows, and not `rescaled_rows`."""
    module = module_of("few_rows")
    return module is not None and bool(module.rescaling_pays_in_one_pass(x, weight))


def same_gain(weight: Tensor, sums: Tensor, sources: Sequence[Tensor], kept: Sequence[Tensor]) -> bool:
    """Whether neither a weight nor the sources of a gain have changed since; native kernels are there."""
    same: bool = module_of("few_rows").same_gain(weight, sums, sources, kept)
    return same


def rescaled_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, gain: Tensor
) -> Tensor | None:
    """Return ``gain * (x @ weight.T + scale * (x @ a.T) @ b.T) + bias`` by the library's base product, or None.

    The gain is that of the weight of now. None also where b is zero. For the rest see `rescaled_few`.
    """
    if not usual(x, a, b, gain) or (bias is not None and (bias.dtype is not x.dtype or not bias.is_contiguous())):
        return None
    if a.shape[1] != x.shape[-1] or b.shape != (weight.shape[0], a.shape[0]) or gain.numel() != b.shape[0]:
        return None
    y = linear(x, weight)
    return y if module_of("few_rows").rescale_low_rank_(y, x, a, b, scale, gain, bias) else None


def rotated_few(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    gain: Tensor | None = None,
    sources: Sequence[Tensor] = (),
    kept: Sequence[Tensor] = (),
) -> Tensor | None:
    """Return ``gain * (rotated(x) @ weight.T) + bias`` in one pass over the weight, or None.

    None also where the blocks may be others by now, and where the rotation changes no number of x: the output then has
    every bit of the frozen layer's, which the operators see to.

    Args:
        x: (..., in), in the dtype of the weight.
        weight: (out, in).
        bias: (out,) or None.
        blocks: (in / b, b, b), or (1, b, b) if shared.
        gain: Of `out` numbers, or None.
        sources: What the blocks were computed from.
        kept: What tells whether these have changed since.
    """
    module = module_of("few_rows")
    if type(x) not in ORDINARY or not x.is_cpu or module is None:
        return None
    most = module.ONE_PASS_ROWS.get(x.dtype, 0)
    y: Tensor | None = module.rotate(x, weight, bias, blocks, gain, sources, kept, most)
    return y


def rotated_rows(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor | None:
    """Return ``rotated(x) @ weight.T + bias``, or None, for more rows than `rotated_few` takes.

    Args:
        x: (..., in), in float32.
        weight: (out, in), in float32.
        bias: (out,) or None.
        blocks: (in / b, b, b), or (1, b, b) if shared.
    """
    module = module_of("few_rows")
    if type(x) not in ORDINARY or not x.is_cpu or module is None:
        return None
    turned: Tensor | None = module.rotated(x, weight, blocks, FEW)
    return None if turned is None else linear(turned, weight, bias)
