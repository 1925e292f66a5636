"""LoKr: a Kronecker product as the update (Yeh et al., arXiv 2309.14859)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from .. import functional as F
from ..ops._few_rows import rows_of_one_pass
from ..ops.conv import Convolution, convolve_with
from ..ops.kronecker import DIRECT_ROWS, kronecker_few
from . import dora
from ._base_layer import NONE, Few, call, plain_tensors, unobserved


class Kronecker(NamedTuple):
    """The tensors and settings of one adapter on one layer: ``scale * kron(w1, w2)``.

    Attributes:
        w1: (l, m), or its two factors (l, r) and (r, m).
        w2: (k, n) or (k, n, *kernel); or its two factors (k, r) and (r, n * taps of the kernel); or, in Tucker form,
            (r, k), (r, n) and the core (r, r, *kernel) or (r, r, taps, 1).
        scale: A number, or a tensor of one number.
        kept: (out,), which rows of the update stay in this pass; None for all of them.
        gain: (out,), a factor for every output but its bias, which DoRA's magnitudes make; or None.
        input_gain: (in,), a factor for every input, which magnitudes of inputs make, or None; such an adapter is alone.

    A w2 of three dimensions, (k, n, taps), stands for Hugging Face PEFT's update of an nn.Conv1d, whose numbers lie
    elsewhere than in a Kronecker product: those of ``kron(w1, w2[i])``, (l * n, m * taps), for one i after the other,
    are read in the order of a weight (l * k, m * n, taps).
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float | Tensor
    kept: Tensor | None = None
    gain: Tensor | None = None
    input_gain: Tensor | None = None

    @property
    def reordered(self) -> bool:
        """Whether the update is that of PEFT's nn.Conv1d with a whole w2."""
        return self.w2[0].dim() == 3


def first(adapter: Kronecker, dtype: torch.dtype | None = None) -> Tensor:
    """Return w1, (l, m), computed in a dtype if one is given."""
    parts = adapter.w1
    return _cast(parts[0], dtype) if len(parts) == 1 else _product(parts[0], parts[1], dtype)


def second(adapter: Kronecker, dtype: torch.dtype | None = None) -> Tensor:
    """Return w2 as a matrix, (k, n * taps), computed in a dtype if one is given; (k * n, taps) if it is reordered."""
    parts = adapter.w2
    if len(parts) == 1:
        return _cast(parts[0], dtype).flatten(0, 1) if adapter.reordered else _cast(parts[0], dtype).flatten(1)
    if len(parts) == 2:
        return _product(parts[0], parts[1], dtype)
    a, b, core = parts
    taps = _product(b.mT, core.transpose(0, 1).flatten(1), dtype)  # (n, r * taps)
    taps = taps.view(b.shape[1], core.shape[0], -1).transpose(0, 1).flatten(1)
    return _product(a.mT, taps, dtype)


def _cast(parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
    return parameter if dtype is None else parameter.to(dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Multiply two small factors, in float32 at least, also under autocast."""
    if dtype is None:
        dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return a.to(dtype) @ b.to(dtype)


def linear(
    base: nn.Module,
    x: Tensor,
    adapters: Sequence[Kronecker],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of a linear layer with adapters, without the dense products.

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
    base: nn.Module, x: Tensor, adapters: Sequence[Kronecker], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    head = adapters[0]
    plain, scale = None, head.scale
    if head.kept is None and not thin(head) and not isinstance(scale, Tensor):
        plain = plain_tensors(base, x, args, kwargs)
    if plain is None or isinstance(scale, Tensor):
        y = call(base, x, *args, **kwargs)
    else:
        w1, w2 = first(head), second(head)
        if len(adapters) == 1 and not base.training and unobserved():
            found = kronecker_few(x, *plain, w1, w2, scale)
            if found is not None:
                return found
        y = F.kronecker_linear(x, *plain, w1, w2, scale)
        adapters = adapters[1:]
    for adapter in adapters:
        y = add(y, x, adapter)
    return y


def few(weight: Tensor, bias: Tensor | None, adapter: Kronecker) -> Few | None:
    """Return how a plain linear layer with one adapter runs few rows, or None if operators always do.

    Args:
        weight: The weight of the layer, (out, in).
        bias: Its bias, (out,), or None.
        adapter: The adapter.
    """
    scale = adapter.scale
    if adapter.kept is not None or adapter.gain is not None or adapter.input_gain is not None:
        return None
    if thin(adapter) or isinstance(scale, Tensor):
        return None

    def run(x: Tensor) -> Tensor | None:
        return kronecker_few(x, weight, bias, first(adapter), second(adapter), scale)

    return Few(run, max(DIRECT_ROWS, rows_of_one_pass(weight.dtype)))


def thin(adapter: Kronecker) -> bool:
    """Whether the two factors of w2 one after the other take far fewer operations than their product."""
    if len(adapter.w2) == 1:
        return False
    (k, r), n = adapter.w2[0].shape, adapter.w2[1].shape[1]
    return 2 * r * (k + n) <= k * n


def _scaled(adapter: Kronecker, dtype: torch.dtype | None = None) -> tuple[Tensor, float]:
    """Return w1, with the scale in it if that is a tensor, and the scale that is left."""
    w1, scale = first(adapter, dtype), adapter.scale
    return (w1 * scale.to(w1.dtype), 1.0) if isinstance(scale, Tensor) else (w1, scale)


def add(result: Tensor, x: Tensor, adapter: Kronecker) -> Tensor:
    """Add an adapter to the output of a linear layer, (..., out), whose input was x, (..., in)."""
    w1, scale = _scaled(adapter)
    if thin(adapter):
        w2, b = adapter.w2
        # (..., m * n) to (..., m * r)
        x = tf.linear(x.unflatten(-1, (w1.shape[1], b.shape[1])), b.to(x.dtype)).flatten(-2)
    else:
        w2 = second(adapter)
    adapted = F.kronecker_add(result, x, w1, w2, scale)
    return adapted if adapter.kept is None else torch.where(adapter.kept, adapted, result)


def conv(
    base: Convolution,
    x: Tensor,
    adapters: Sequence[Kronecker],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of a convolution with adapters on its filters, as one convolution with the written weight.

    Args:
        base: An nn.Conv1d, nn.Conv2d or nn.Conv3d; frozen.
        x: (batch, in, *size) or (in, *size).
        adapters: What is added, in this order; one with a gain rescales what is there before it.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    x = dora.with_scaled_inputs(x, adapters, -len(base.kernel_size) - 1, base.groups)
    values: list[Tensor] = []
    written = []
    for adapter in adapters:
        w1, scale = _scaled(adapter)
        values += [w1, second(adapter), *(t for t in (adapter.kept, adapter.gain) if t is not None)]
        written.append((scale, adapter.kept is not None, adapter.gain is not None, _slices(adapter)))
    write = functools.partial(_written, written)
    plain = plain_tensors(base, x, args, kwargs)
    return convolve_with(write, base, x, *values, plain=plain, args=args, kwargs=kwargs)


def _slices(adapter: Kronecker) -> int | None:
    """Return k where the update is reordered, and else None."""
    return len(adapter.w2[0]) if adapter.reordered else None


def _written(adapters: list[tuple[float, bool, bool, int | None]], weight: Tensor, *values: Tensor) -> Tensor:
    """Add each adapter's product to a weight, only in the rows that stay where there is a mask among its values.

    Where there is a gain behind it, the rows are scaled then.
    """
    filters, rest = weight.flatten(1), iter(values)
    for scale, has_mask, has_gain, slices in adapters:
        changed = _with_product(filters, next(rest), next(rest), scale, slices)
        filters = torch.where(next(rest)[:, None], changed, filters) if has_mask else changed
        filters = dora.rescaled_weight(filters, next(rest) if has_gain else None)
    return filters.view(weight.shape)


def _with_product(filters: Tensor, w1: Tensor, w2: Tensor, scale: float, slices: int | None) -> Tensor:
    """Return filters, (out, in * taps), with a product in them, whose numbers are reordered if it has `slices`."""
    if slices is None:
        return F.kronecker_weight(filters, w1, w2, scale)
    rows, taps = len(w2) // slices, w2.shape[1]
    # One Kronecker product makes all slices, row by row of w1; they change places with those rows.
    apart = filters.reshape(slices, len(w1), rows, w1.shape[1] * taps).transpose(0, 1)
    changed = F.kronecker_weight(apart.flatten(0, 2), w1, w2, scale)
    return changed.reshape(apart.shape).transpose(0, 1).reshape(filters.shape)


@torch.no_grad()
def update(adapter: Kronecker, shape: Sequence[int]) -> Tensor:
    """Return the dense update in the shape of the weight, in the dtype of the factors."""
    w1 = first(adapter)
    return merged(torch.zeros(*shape, dtype=w1.dtype, device=w1.device), adapter)


def merged(weight: Tensor, adapter: Kronecker) -> Tensor:
    """Return a weight, (out, in) or (out, in, *kernel), with one adapter in it."""
    (w1, scale), w2 = _scaled(adapter, weight.dtype), second(adapter, weight.dtype)
    filters = _with_product(weight.flatten(1), w1, w2, scale, _slices(adapter))
    changed = dora.rescaled_weight(filters, adapter.gain).view(weight.shape)
    return dora.rescaled_weight(changed, adapter.input_gain, 1)


def norms(base: nn.Module, adapter: Kronecker, weight: Tensor | None = None, of_inputs: bool = False) -> Tensor:
    """Return the norms of the rows of the weight with an adapter in it, (out,), without its gain.

    The adapter must be without dropout. The other arguments: `dora.dense_norms`.
    """
    plain = adapter._replace(gain=None, input_gain=None)
    return dora.dense_norms(base, lambda weight: merged(weight, plain), weight, of_inputs)
