"""LoRA on convolutions: A is a convolution of the base layer's geometry, B a 1x1 convolution."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from .. import functional as F
from ..ops.bias import add_bias
from ..ops.conv import channels_last, convolve_frozen, convolve_thin, expand
from ..ops.dropout import Drawn, Dropout
from . import dora
from ._base_layer import NONE, plain_tensors
from .lora import LowRank, mixed_bias, mixed_gate, mixed_groups, side_by_side


def conv2d(
    base: nn.Conv2d, x: Tensor, adapters: Sequence[LowRank], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NONE
) -> Tensor:
    """Return the output of a convolution with adapters.

    Args:
        base: An nn.Conv2d; frozen. A sees all channels whatever its groups; B has its groups.
        x: (batch, in, height, width) or (in, height, width).
        adapters: What is added, in this order; one with magnitudes rescales what is there before it.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.

    Returns:
        The output in the dtype of the base layer's.
    """
    # What the base layer has just made and nobody has seen may be written to.
    fresh = plain_tensors(base, x, args, kwargs) is not None and not torch.compiler.is_compiling()
    result = base(x, *args, **kwargs)
    x = x.to(result.dtype)
    for adapter in adapters:
        result = _added(base, result, x, adapter, fresh)
    return result


def _added(
    base: nn.Conv2d, result: Tensor, x: Tensor, adapter: LowRank, fresh: bool, dropped: Tensor | None = None
) -> Tensor:
    a, b = adapter.a, adapter.b
    seen = Dropout(x, adapter.dropout_p) if dropped is None else Drawn(dropped.to(result.dtype))
    if adapter.magnitude is not None:
        g = dora.gain_of(base, adapter)
        result = _rescaled(base, result, seen, g, adapter.dropout_p > 0 or dropped is not None)
        b = b * g.view(-1, 1, 1, 1).to(b.dtype)
        fresh = False
    hidden = seen.product(functools.partial(convolve_thin, base), a)
    result = expanded(base, result, hidden, b, adapter.scale, fresh)
    return result if adapter.bias is None else add_bias(result, adapter.bias, -3)


def add(base: nn.Conv2d, result: Tensor, x: Tensor, adapter: LowRank, dropped: Tensor | None = None) -> Tensor:
    """Apply an adapter to the output of a convolution; nothing is written to. The arguments: `dora.rescale_linear`."""
    return _added(base, result, x.to(result.dtype), adapter, fresh=False, dropped=dropped)


def _rescaled(base: nn.Conv2d, result: Tensor, seen: Dropout | Drawn, g: Tensor, drops: bool) -> Tensor:
    if drops:
        # The base product that g scales is that of the dropped input too, as in Hugging Face PEFT.
        x = seen.dropped()
        second = convolve_frozen(base, x, base.weight.to(x.dtype))
        return torch.addcmul(result, second, (g - 1).to(result.dtype).view(-1, 1, 1))
    if channels_last(result):
        return F.scale_channels(result.permute(0, 2, 3, 1), g, base.bias).permute(0, 3, 1, 2)
    return F.scale_channels(result, g, base.bias, dim=-3)


def expanded(
    base: nn.Conv2d, result: Tensor, hidden: Tensor, b: Tensor, scale: float | Tensor, fresh: bool = False
) -> Tensor:
    """Add ``scale * B hidden`` to a result, onto it where it is `fresh`.

    Args:
        base: The layer, whose groups B has.
        result: (batch, out, height, width) or (out, height, width).
        hidden: The same with the rank in place of the channels.
        b: (out, r / groups, 1, 1).
        scale: The factor.
        fresh: Whether nobody else reads `result`.
    """
    if base.groups > 1 or result.dim() == 3 or isinstance(scale, Tensor):
        added = tf.conv2d(hidden, b.to(hidden.dtype), groups=base.groups) * scale
        return result + added.to(result.dtype)
    return expand(result, hidden, b.flatten(1), float(scale), fresh)


def conv2d_mixed(
    base: nn.Conv2d,
    x: Tensor,
    adapters: Sequence[LowRank],
    choice: Sequence[int],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of a convolution on a batch whose samples have different adapters; see `lora.linear_mixed`."""
    result = base(x, *args, **kwargs)
    x = x.to(result.dtype)
    groups = mixed_groups(adapters)
    if base.groups > 1:
        groups = [[index] for group in groups for index in group]
    for group in groups:
        a, b = side_by_side(adapters, group)
        gate = mixed_gate(adapters, group, choice, x)
        result = expanded(base, result, convolve_thin(base, x, a) * gate.view(*gate.shape, 1, 1), b, 1.0)
        bias = mixed_bias(adapters, group, choice, result, base.out_channels)
        if bias is not None:
            result = result + bias.view(len(x), -1, 1, 1)
    return result
