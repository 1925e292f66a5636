"""DoRA: the magnitude of every output of an adapted layer is a parameter (Liu et al., arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from .. import functional as F
from ..kernels.shared.wide import wide
from ..ops._few_rows import FEW, rescaled_few, rescaled_in_one_pass, rescaled_rows, same_gain
from ..ops._few_rows import few as few_rows
from ..ops.conv import channels_last
from ..ops.dropout import Drawn, Dropout
from ..ops.kept import keeps, rows_in_memory, same_weight, weight_sums
from ._base_layer import Few, opaque_weight, rows_of, stored
from ._quantised import dequantised

if TYPE_CHECKING:
    from .lora import LowRank


def norms(base: Any, a: Tensor, b: Tensor, scale: float | Tensor, of_inputs: bool = False) -> Tensor:
    """Return the norms of the rows of ``W + scale * B A``, (out,), through which no gradient passes.

    With `of_inputs` those of its columns, (in,), a column of a convolution being what reads one channel.
    """
    # A quantised weight is made dense for each pass: what is kept of it between them would be as large as it is.
    weight = rows_of(base, base.weight) if opaque_weight(base) is None else dequantised(base)
    if of_inputs:
        return _column_norms(weight.detach(), a.detach(), b.detach(), scale)
    if weight.dim() > 2 and channels_last(weight):
        # The order of the columns changes no norm, and this one copies no weight.
        weight, a = weight.movedim(1, -1), a.movedim(1, -1)
    return F.dora_norm(weight.flatten(1), a.flatten(1), b.flatten(1), scale)


def _column_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    if weight.dim() == 2:
        return F.dora_norm(weight.mT, b.mT, a.mT, scale)
    dtype = wide(weight.dtype)
    update = b.flatten(1).to(dtype) @ a.flatten(1).to(dtype)
    return _along(weight.to(dtype) + (scale * update).view(weight.shape), 1)


def _along(weight: Tensor, dim: int) -> Tensor:
    """Return the norms of what a weight has at each place of one dimension."""
    return torch.linalg.vector_norm(weight, dim=[d for d in range(weight.dim()) if d != dim])


@torch.no_grad()
def dense_norms(
    base: Any, write: Callable[[Tensor], Tensor], weight: Tensor | None = None, of_inputs: bool = False
) -> Tensor:
    """Return the norms of the rows of an adapted weight, (out,), or of its columns, in float32 at least.

    Args:
        base: The layer.
        write: Returns its weight, (out, in) or (out, in, *kernel), with an adapter in it.
        weight: What stands for that weight where others are merged into it; None means the weight itself.
        of_inputs: Whether to return the norms of the columns, (in,), of a convolution in groups (in / groups,).
    """
    if weight is None:
        weight = rows_of(base, base.weight) if opaque_weight(base) is None else dequantised(base)
    return _along(write(weight.detach().to(wide(weight.dtype))), 1 if of_inputs else 0)


class _Gained(Protocol):
    @property
    def gain(self) -> Tensor | None:
        """A factor of every output, (out,), or None."""

    @property
    def input_gain(self) -> Tensor | None:
        """A factor of every input, (in,), or None."""


def with_scaled_inputs(x: Tensor, adapters: Sequence[_Gained], dim: int = -1, groups: int = 1) -> Tensor:
    """Return the input of a layer as its adapter reads it whose magnitudes are those of inputs; else the input itself.

    Args:
        x: The input.
        adapters: All that act on the layer.
        dim: Where its channels are.
        groups: Those of a convolution, which share the factors.

    Raises:
        ValueError: There are such magnitudes, and more than one adapter.
    """
    gains = [adapter.input_gain for adapter in adapters if adapter.input_gain is not None]
    if not gains:
        return x
    check_alone(adapters)
    return F.scale_channels(x, gains[0].repeat(groups), dim=dim)


def check_alone(adapters: Sequence[object]) -> None:
    """Raise ValueError if there is more than one adapter, where one has magnitudes of inputs."""
    if len(adapters) > 1:
        raise ValueError(
            f"dora_inputs: an adapter with magnitudes of inputs changes what the others read; expected it alone, got "
            f"{len(adapters)} adapters on one layer: activate or merge it without others"
        )


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


def rescaled_weight(weight: Tensor, gain: Tensor | None, dim: int = 0) -> Tensor:
    """Scale the rows of a weight, (out, in) or (out, in, *kernel), or its columns, with a gain in float32 at least."""
    if gain is None:
        return weight
    places = [1] * weight.dim()
    places[dim] = -1
    return (weight * gain.to(wide(weight.dtype)).view(places)).to(weight.dtype)


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return ``magnitude / norms``, (out,), through which no gradient reaches the norms; a zero row is left alone."""
    magnitude = magnitude.reshape(-1)
    norms = norms.detach().to(magnitude.dtype)
    return magnitude / torch.where(norms == 0, torch.ones_like(norms), norms)


def gain_of(base: nn.Module, adapter: LowRank) -> Tensor:
    """Return DoRA's factor of every output of a layer with an adapter, (out,), or of every input, (in,).

    Where nothing is recorded, it is what an earlier call has found, if neither the parameters nor the weight have
    changed since: checksums of the weight take a sixth of the time of its norms.
    """
    known = _verified(base, adapter)
    return _gain_of(base, adapter) if known is None else known.gain


def _gain_of(base: nn.Module, adapter: LowRank) -> Tensor:
    assert adapter.magnitude is not None
    return gain(adapter.magnitude, norms(base, adapter.a, adapter.b, adapter.scale, adapter.of_inputs))


class _Known(NamedTuple):
    """A gain, the checksums of the weight that it was computed from, and that of now, which may be another one."""

    gain: Tensor
    sums: Tensor
    rows: Tensor


def _known(base: nn.Module, adapter: LowRank) -> _Known | None:
    """Return the gain that is kept for the parameters of an adapter, or None where none is kept.

    It is made where there is none yet. Whether the weight is still the same is left to the caller.
    """
    kept, scale, magnitude = adapter.kept, adapter.scale, adapter.magnitude
    if kept is None or magnitude is None or type(scale) is not float or opaque_weight(base) is not None:
        return None
    sources, weight = (adapter.a, adapter.b, magnitude), stored(base)
    if not keeps(sources):
        return None
    rows = rows_in_memory(weight)
    if rows is None:
        return None
    found, sums = kept.get(sources, lambda: (_gain_of(base, adapter), weight_sums(rows)), _settings(scale, weight))
    return _Known(found, sums, rows)


def _verified(base: nn.Module, adapter: LowRank) -> _Known | None:
    """Return the gain of the weight of now, which is kept, or None where none is kept."""
    known = _known(base, adapter)
    if known is None or same_weight(known.rows, known.sums):
        return known
    assert adapter.kept is not None
    adapter.kept.forget()
    return _known(base, adapter)


def _settings(scale: float, weight: Tensor) -> tuple[Any, ...]:
    """Return what a gain depends on beside bits: the same words in another order are another weight."""
    return scale, weight.dtype, weight.shape, weight.stride()


def few(weight: Tensor, bias: Tensor | None, base: nn.Module, adapter: LowRank) -> Few | None:
    """Return how a plain linear layer with one adapter runs few rows, or None if operators always do.

    Args:
        weight: The weight of the layer, (out, in).
        bias: Its bias, (out,), or None.
        base: The layer.
        adapter: The adapter, with magnitudes and a place where its gain is kept.
    """
    a, b, scale, gate, extra, p, magnitude, kept = adapter[:8]
    if kept is None or magnitude is None or type(scale) is not float or p > 0 or gate is not None or extra is not None:
        return None
    # Another layout, or another dtype, has no kernel or other checksums.
    sources, settings = (a, b, magnitude), _settings(scale, weight)

    def run(x: Tensor) -> Tensor | None:
        if not rescaled_in_one_pass(x, weight):
            return beside_library(x) if few_rows(x, x.shape[-1]) else None
        # Usually nothing has changed, which the call that reads the weight finds out by itself. Else the gain is found
        # first, and the call repeated: equal calls have equal bits.
        for prepare in (None, _verified):
            if prepare is not None and prepare(base, adapter) is None:
                return None
            held = kept.held(settings)
            if held is None:
                continue
            bits, (gain, sums) = held
            y = rescaled_few(x, weight, bias, a, b, scale, gain, sums, sources, bits)
            if y is not None:
                return y
        return None

    def beside_library(x: Tensor) -> Tensor | None:
        held = kept.held(settings)
        if held is not None and same_gain(weight, held[1][1], sources, held[0]):
            return rescaled_rows(x, weight, bias, a, b, scale, held[1][0])
        known = _verified(base, adapter)
        return None if known is None else rescaled_rows(x, weight, bias, a, b, scale, known.gain)

    return Few(run, FEW)


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
