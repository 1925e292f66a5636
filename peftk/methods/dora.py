"""DoRA: the magnitude of every output of an adapted layer is a parameter (Liu et al., arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from .. import functional as F
from ..kernels.shared.wide import wide
from ..ops.conv import channels_last
from ..ops.dropout import Drawn, Dropout
from ._base_layer import opaque_weight, rows_of
from ._quantised import dequantised

if TYPE_CHECKING:
    from .lora import LowRank


def norms(base: Any, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """Return the norms of the rows of ``W + scale * B A``, (out,), through which no gradient passes."""
    # A quantised weight is made dense for each pass: what is kept of it between them would be as large as it is.
    weight = rows_of(base, base.weight) if opaque_weight(base) is None else dequantised(base)
    if weight.dim() > 2 and channels_last(weight):
        # The order of the columns changes no norm, and this one copies no weight.
        weight, a = weight.movedim(1, -1), a.movedim(1, -1)
    return F.dora_norm(weight.flatten(1), a.flatten(1), b.flatten(1), scale)


@torch.no_grad()
def dense_norms(base: Any, write: Callable[[Tensor], Tensor], weight: Tensor | None = None) -> Tensor:
    """Return the norms of the rows of an adapted weight, (out,), in float32 at least.

    Args:
        base: The layer.
        write: Returns its weight, (out, in) or (out, in, *kernel), with an adapter in it.
        weight: What stands for that weight where others are merged into it; None means the weight itself.
    """
    if weight is None:
        weight = rows_of(base, base.weight) if opaque_weight(base) is None else dequantised(base)
    return torch.linalg.vector_norm(write(weight.detach().to(wide(weight.dtype))).flatten(1), dim=1)


class _Gained(Protocol):
    @property
    def gain(self) -> Tensor | None:
        """A factor of every output, (out,), or None."""


G = TypeVar("G", bound=_Gained)


def runs(adapters: Sequence[G]) -> list[list[G]]:
    """Return adapters in turn, those that may be added together in one list; the last of a list may have a gain."""
    found: list[list[G]] = [[]]
    for adapter in adapters:
        found[-1].append(adapter)
        if adapter.gain is not None:
            found.append([])
    return [run for run in found if run]


def rescaled(base: Any, result: Tensor, gain: Tensor | None) -> Tensor:
    """Scale the outputs of a linear layer, (..., out), about its bias."""
    return result if gain is None else F.scale_channels(result, gain, base.bias)


def rescaled_weight(weight: Tensor, gain: Tensor | None) -> Tensor:
    """Scale the rows of a weight, (out, in) or (out, in, *kernel), with a gain in float32 at least."""
    if gain is None:
        return weight
    return (weight * gain.to(wide(weight.dtype)).view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return ``magnitude / norms``, (out,), through which no gradient reaches the norms; a zero row is left alone."""
    magnitude = magnitude.view(-1)
    norms = norms.detach().to(magnitude.dtype)
    return magnitude / torch.where(norms == 0, torch.ones_like(norms), norms)


def gain_of(base: nn.Module, adapter: LowRank) -> Tensor:
    """Return DoRA's factor of every output of a layer with an adapter, (out,)."""
    assert adapter.magnitude is not None
    return gain(adapter.magnitude, norms(base, adapter.a, adapter.b, adapter.scale))


def rescale_linear(base: Any, result: Tensor, x: Tensor, adapter: LowRank, dropped: Tensor | None = None) -> Tensor:
    """Apply an adapter with magnitudes to the output of a linear layer, (..., out).

    Args:
        base: The layer.
        result: What it and the adapters before this one have made.
        x: Its input, (..., in).
        adapter: The adapter.
        dropped: The input as dropout has left it, where the caller draws; the adapter's own probability is then zero.
    """
    a, b, scale, p = adapter.a, adapter.b, adapter.scale, adapter.dropout_p
    g = gain_of(base, adapter)
    if p == 0 and dropped is None:
        return F.dora_compose(result, x, a, b, g, base.bias, scale)
    # The base product that g scales is that of the dropped input too, as in Hugging Face PEFT.
    seen = Dropout(x, p) if dropped is None else Drawn(dropped.to(result.dtype))
    second = _product(base, seen.dropped())
    result = torch.addcmul(result, second, (g - 1).to(result.dtype))
    hidden = seen.product(tf.linear, a.to(x.dtype))
    b = (b * (g.unsqueeze(1) * scale)).to(x.dtype)
    rows, hidden = (t.reshape(-1, t.shape[-1]) for t in (result, hidden))
    return torch.addmm(rows, hidden, b.mT).view(result.shape)


def _product(base: Any, x: Tensor) -> Tensor:
    """Return the product of an input and the weight of a linear layer, (..., out), without its bias."""
    if opaque_weight(base) is None:
        return tf.linear(x, rows_of(base, base.weight).to(x.dtype))
    # The layer keeps less for the backward pass than a dense weight. No hook is to see a second call.
    result: Tensor = base.forward(x).to(x.dtype)
    return result if base.bias is None else result - base.bias.to(x.dtype)
