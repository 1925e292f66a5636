"""LoHa: the Hadamard product of two low-rank updates (Hyeon-Woo et al., arXiv 2108.06098; Yeh et al., arXiv
2309.14859).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..kernels.shared.wide import wide
from ..ops._few_rows import FEW
from ..ops._hadamard_linear import Factors, add_hadamard, hadamard_few, hadamard_linear, low_rank_pays
from ..ops.conv import Convolution, convolve_thin, convolve_with, expand
from . import dora
from ._base_layer import NONE, Few, call, plain_tensors, unobserved


class Hadamard(NamedTuple):
    """The tensors and settings of one adapter on one layer: ``scale * (w1_a w1_b) * (w2_a w2_b)``.

    Attributes:
        w1_a: (out, r), or (r, out) beside a core.
        w1_b: (r, in), or (r, in * taps) for the taps of a kernel; (r, in) beside a core.
        w2_a: As `w1_a`.
        w2_b: As `w1_b`.
        scale: A number.
        t1: The core of the first matrix in Tucker form, (r, r, *kernel), or (r, r, taps, 1); or None.
        t2: That of the second one.
        rows: (out,), a factor for every row of the update, which dropout makes; or None.
        gain: (out,), a factor for every output but its bias, which DoRA's magnitudes make; or None.
        input_gain: (in,), a factor for every input, which magnitudes of inputs make, or None; such an adapter is alone.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float
    t1: Tensor | None = None
    t2: Tensor | None = None
    rows: Tensor | None = None
    gain: Tensor | None = None
    input_gain: Tensor | None = None


def factors(adapter: Hadamard, dtype: torch.dtype | None = None) -> Factors:
    """Return w1_a (out, r), w1_b (r, in), w2_a and w2_b, whatever the form, in `dtype` if given."""
    w1_a, w1_b, w2_a, w2_b = (f if dtype is None else f.to(dtype) for f in adapter[:4])
    if adapter.t1 is not None and adapter.t2 is not None:
        t1, t2 = (core if dtype is None else core.to(dtype) for core in (adapter.t1, adapter.t2))
        w1_a, w1_b, w2_a, w2_b = w1_a.mT, _tucker(t1, w1_b), w2_a.mT, _tucker(t2, w2_b)
    if adapter.rows is not None:
        w1_a = w1_a * adapter.rows.to(w1_a.device, w1_a.dtype)[:, None]
    return w1_a, w1_b, w2_a, w2_b


def _tucker(core: Tensor, w_b: Tensor) -> Tensor:
    """Return the (r, in * taps) factor that a core and the factor of the channels make."""
    return torch.einsum("ijk,jq->iqk", core.flatten(2), w_b).flatten(1)


def linear(
    base: nn.Module, x: Tensor, adapters: Sequence[Hadamard], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NONE
) -> Tensor:
    """Return the output of a linear layer with adapters.

    Args:
        base: An nn.Linear, or a layer that is derived from it and quantised; frozen.
        x: (..., in).
        adapters: What is added, in this order; one with a gain rescales what is there before it.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    x = dora.with_scaled_inputs(x, adapters)
    first, *others = dora.runs(adapters)
    y = dora.rescaled(base, _linear(base, x, first, args, kwargs), first[-1].gain)
    for run in others:
        for adapter in run:
            y = add(y, x, adapter)
        y = dora.rescaled(base, y, run[-1].gain)
    return y


def _linear(
    base: nn.Module, x: Tensor, adapters: Sequence[Hadamard], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    fours = [factors(adapter) for adapter in adapters]
    scales = [adapter.scale for adapter in adapters]
    plain = plain_tensors(base, x, args, kwargs)
    if plain is not None:
        if len(fours) == 1 and not base.training and unobserved():
            y = hadamard_few(x, *plain, scales[0], fours[0])
            if y is not None:
                return y
        return hadamard_linear(x, *plain, scales, fours)
    y = call(base, x, *args, **kwargs)
    for scale, four in zip(scales, fours, strict=True):
        y = add_hadamard(y, x, scale, four)
    return y


def few(weight: Tensor, bias: Tensor | None, adapter: Hadamard) -> Few | None:
    """Return how a plain linear layer with one adapter runs few rows, or None if operators always do.

    Args:
        weight: The weight of the layer, (out, in).
        bias: Its bias, (out,), or None.
        adapter: The adapter.
    """
    if any(part is not None for part in adapter[5:]):
        return None
    four, scale = factors(adapter), adapter.scale
    return Few(lambda x: hadamard_few(x, weight, bias, scale, four), FEW)


def add(result: Tensor, x: Tensor, adapter: Hadamard) -> Tensor:
    """Add an adapter to the output of a linear layer, (..., out), whose input was x, (..., in)."""
    return add_hadamard(result, x, adapter.scale, factors(adapter))


def conv(
    base: Convolution,
    x: Tensor,
    adapters: Sequence[Hadamard],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of a convolution with adapters on its flattened filters.

    Small ranks run as a convolution to ``r * r`` channels and a product with (out, r * r); larger ones, and groups, as
    one convolution with the written weight, and so do gains.

    Args:
        base: An nn.Conv1d, nn.Conv2d or nn.Conv3d; frozen.
        x: (batch, in, *size) or (in, *size).
        adapters: What is added, in this order; one with a gain rescales what is there before it.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    x = dora.with_scaled_inputs(x, adapters, -len(base.kernel_size) - 1, base.groups)
    written: list[tuple[float, bool]] = []
    values: list[Tensor] = []
    added: list[tuple[float, Factors]] = []
    gained = any(adapter.gain is not None for adapter in adapters)
    for adapter in adapters:
        four = factors(adapter)
        if not gained and _low_rank_pays(base, four):
            added.append((adapter.scale, four))
            continue
        written.append((adapter.scale, adapter.gain is not None))
        values += [*four, *([] if adapter.gain is None else [adapter.gain])]
    if written:

        def write(weight: Tensor, *values: Tensor) -> Tensor:
            rest = iter(values)
            for scale, has_gain in written:
                weight = F.hadamard_weight(weight, next(rest), next(rest), next(rest), next(rest), scale)
                weight = dora.rescaled_weight(weight, next(rest) if has_gain else None)
            return weight

        plain = plain_tensors(base, x, args, kwargs)
        y = convolve_with(write, base, x, *values, plain=plain, args=args, kwargs=kwargs)
    else:
        y = base(x, *args, **kwargs)
    for scale, four in added:
        y = _add_low_rank(base, y, x, scale, four)
    return y


def _low_rank_pays(base: Convolution, four: Factors) -> bool:
    w1_a, w1_b, w2_a, _ = four
    # Convolutions have many positions: what writing the weight costs does not count beside them.
    sizes = w1_a.shape[0], w1_b.shape[1], w1_a.shape[1], w2_a.shape[1]
    return base.groups == 1 and low_rank_pays(1 << 20, *sizes)


def _add_low_rank(base: Convolution, y: Tensor, x: Tensor, scale: float, four: Factors) -> Tensor:
    a, b = F.khatri_rao(*four, dtype=wide(x.dtype))
    hidden = convolve_thin(base, x, a.view(len(a), base.in_channels, *base.kernel_size))
    batch = (y, hidden) if y.dim() == len(base.kernel_size) + 2 else (y[None], hidden[None])
    return expand(*batch, b, scale, False).view(y.shape)


@torch.no_grad()
def update(adapter: Hadamard, shape: Sequence[int]) -> Tensor:
    """Return the dense update in the shape of the weight, in the dtype of the factors."""
    four = factors(adapter)
    zeros = torch.zeros(*shape, dtype=four[0].dtype, device=four[0].device)
    return F.hadamard_weight(zeros, *four, adapter.scale)


def merged(weight: Tensor, adapter: Hadamard) -> Tensor:
    """Return a weight, (out, in) or (out, in, *kernel), with one adapter in it."""
    result = F.hadamard_weight(weight, *factors(adapter, weight.dtype), adapter.scale)
    return dora.rescaled_weight(dora.rescaled_weight(result, adapter.gain), adapter.input_gain, 1)


def norms(base: nn.Module, adapter: Hadamard, weight: Tensor | None = None, of_inputs: bool = False) -> Tensor:
    """Return the norms of the rows of the weight with an adapter in it, (out,), without dropout and gain.

    The arguments: `dora.dense_norms`.
    """
    plain = adapter._replace(rows=None, gain=None, input_gain=None)
    return dora.dense_norms(base, lambda weight: merged(weight, plain), weight, of_inputs)
