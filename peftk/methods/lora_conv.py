"""LoRA on convolutions: A is a convolution of the base layer's geometry, B one of a single tap."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..ops.bias import add_bias
from ..ops.conv import Convolution, channels_last, convolution, convolve_frozen, convolve_thin, expand
from ..ops.dropout import Drawn, Dropout
from . import dora
from ._base_layer import NONE, plain_tensors
from .lora import LowRank, inputs_scaled, mixed_bias, mixed_gate, mixed_groups, side_by_side


def conv(
    base: Convolution,
    x: Tensor,
    adapters: Sequence[LowRank],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of a convolution with adapters.

    Args:
        base: An nn.Conv1d, nn.Conv2d or nn.Conv3d; frozen. A sees all channels whatever its groups; B has its groups.
        x: (batch, in, *size) or (in, *size).
        adapters: What is added, in this order; one with magnitudes rescales what is there before it.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.

    Returns:
        The output in the dtype of the base layer's.
    """
    x, adapters = inputs_scaled(base, x, adapters, _channels(base))
    # What the base layer has just made and nobody has seen may be written to.
    fresh = plain_tensors(base, x, args, kwargs) is not None and not torch.compiler.is_compiling()
    result = base(x, *args, **kwargs)
    x = x.to(result.dtype)
    for adapter in adapters:
        result = _added(base, result, x, adapter, fresh)
    return result


def _added(
    base: Convolution, result: Tensor, x: Tensor, adapter: LowRank, fresh: bool, dropped: Tensor | None = None
) -> Tensor:
    a, b = adapter.a, adapter.b
    seen = Dropout(x, adapter.dropout_p) if dropped is None else Drawn(dropped.to(result.dtype))
    if adapter.magnitude is not None:
        g = dora.gain_of(base, adapter)
        result = _rescaled(base, result, seen, g, adapter.dropout_p > 0 or dropped is not None)
        b = b * g.view(-1, *[1] * (b.dim() - 1)).to(b.dtype)
        fresh = False
    hidden = seen.product(functools.partial(convolve_thin, base), a)
    result = expanded(base, result, hidden, b, adapter.scale, fresh)
    return result if adapter.bias is None else add_bias(result, adapter.bias, _channels(base))


def add(base: Convolution, result: Tensor, x: Tensor, adapter: LowRank, dropped: Tensor | None = None) -> Tensor:
    """Apply an adapter to the output of a convolution; nothing is written to. The arguments: `dora.rescale_linear`."""
    return _added(base, result, x.to(result.dtype), adapter, fresh=False, dropped=dropped)


def _rescaled(base: Convolution, result: Tensor, seen: Dropout | Drawn, g: Tensor, drops: bool) -> Tensor:
    if drops:
        # The base product that g scales is that of the dropped input too, as in Hugging Face PEFT.
        x = seen.dropped()
        second = convolve_frozen(base, x, base.weight.to(x.dtype))
        return torch.addcmul(result, second, (g - 1).to(result.dtype).view(-1, *[1] * len(base.kernel_size)))
    return rescaled(base, result, g)


def rescaled(base: Convolution, result: Tensor, gain: Tensor) -> Tensor:
    """Scale the output channels of a convolution, (batch, out, *size) or (out, *size), about its bias."""
    if result.dim() == len(base.kernel_size) + 2 and channels_last(result):
        return F.scale_channels(result.movedim(1, -1), gain, base.bias).movedim(-1, 1)
    return F.scale_channels(result, gain, base.bias, dim=_channels(base))


def _channels(base: Convolution) -> int:
    """Return where the channels of an input or output stand, counted from the end."""
    return -len(base.kernel_size) - 1


def expanded(
    base: Convolution, result: Tensor, hidden: Tensor, b: Tensor, scale: float | Tensor, fresh: bool = False
) -> Tensor:
    """Add ``scale * B hidden`` to a result, onto it where it is `fresh`.

    Args:
        base: The layer, whose groups B has.
        result: (batch, out, *size) or (out, *size).
        hidden: The same with the rank in place of the channels.
        b: (out, r / groups), and a one for each dimension.
        scale: The factor.
        fresh: Whether nobody else reads `result`.
    """
    if base.groups > 1 or result.dim() < b.dim() or isinstance(scale, Tensor):
        added = convolution(hidden, b.to(hidden.dtype), None, 1, 0, 1, base.groups) * scale
        return result + added.to(result.dtype)
    return expand(result, hidden, b.flatten(1), float(scale), fresh)


def conv_mixed(
    base: Convolution,
    x: Tensor,
    adapters: Sequence[LowRank],
    choice: Sequence[int],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of a convolution on a batch whose samples have different adapters; see `lora.linear_mixed`."""
    result = base(x, *args, **kwargs)
    x = x.to(result.dtype)
    groups, places = mixed_groups(adapters), [1] * len(base.kernel_size)
    if base.groups > 1:
        groups = [[index] for group in groups for index in group]
    for group in groups:
        a, b = side_by_side(adapters, group)
        gate = mixed_gate(adapters, group, choice, x)
        hidden = convolve_thin(base, x, a) * gate.view(*gate.shape, *places)
        result = expanded(base, result, hidden, b, 1.0)
        bias = mixed_bias(adapters, group, choice, result, base.out_channels)
        if bias is not None:
            result = result + bias.view(len(x), -1, *places)
    return result
