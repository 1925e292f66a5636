"""LoRA: a low-rank update beside a frozen layer (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from .. import functional as F
from ..ops._few_rows import FEW, low_rank_few
from ..ops.bias import add_bias
from ..ops.kept import Kept
from . import dora
from ._base_layer import DENSE, NONE, Few, call, plain_tensors, unobserved

MIXED_RANK = 256
"""Adapters of one batch share a product as long as their ranks together stay at or below this."""


class LowRank(NamedTuple):
    """The tensors and settings of one adapter on one layer: the update ``scale * (B * gate) A``.

    Attributes:
        a: (r, in), (r, in, *kernel) for a convolution, or (r, num) for an embedding; any floating dtype.
        b: (out, r), (out, r / groups, 1 ...) for a convolution, or (dim, r) for an embedding.
        scale: A number, or a tensor of one number.
        gate: (r,), or with one entry for each row of the input, (..., r); or None.
        bias: What is added to the output, (out,), the scale in it; or None.
        dropout_p: The probability with which an element of the input is dropped; drawn from torch's generator.
        magnitude: DoRA's magnitudes, of `out` elements; or None.
        kept: Where its gain stays between calls that record nothing; or None.
        of_inputs: Whether there is a magnitude for every input instead, of `in` elements. Such an adapter acts alone.
    """

    a: Tensor
    b: Tensor
    scale: float | Tensor = 1.0
    gate: Tensor | None = None
    bias: Tensor | None = None
    dropout_p: float = 0.0
    magnitude: Tensor | None = None
    kept: Kept | None = None
    of_inputs: bool = False


def linear(
    base: nn.Module, x: Tensor, adapters: Sequence[LowRank], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NONE
) -> Tensor:
    """Return the output of a linear layer with adapters.

    Args:
        base: An nn.Linear, GPT-2's Conv1D, or a layer that is derived from nn.Linear and quantised; frozen.
        x: (..., in).
        adapters: What is added, in this order; one with magnitudes rescales what is there before it.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.

    Returns:
        (..., out) in the dtype of the base layer's output.

    Raises:
        ValueError: An adapter with magnitudes of inputs is not alone.
        RuntimeError: The base layer is quantised and passes no gradient to an input that needs one.
    """
    for adapter in adapters:
        if adapter.magnitude is not None:
            return _with_magnitudes(base, x, adapters, args, kwargs)
    plain = plain_tensors(base, x, args, kwargs)
    if plain is not None and len(adapters) == 1 and not base.training and unobserved():
        short = few(base, *plain, adapters[0])
        if short is not None and (y := short.run(x)) is not None:
            return y
    result = None
    if plain is None:
        result = call(base, x, *args, **kwargs)
        if x.dtype != result.dtype:
            x = x.to(result.dtype)
    for a, b, scale, gate, bias, p, *_ in adapters:
        if a.shape[0] == 0:
            continue
        options: dict[str, Any] = {} if gate is None and p == 0 else {"gate": gate, "dropout_p": p}
        if result is None:
            assert plain is not None
            result = F.low_rank_linear(x, *plain, a, b, scale, **options)
        else:
            result = F.low_rank_add(result, x, a, b, scale, **options)
        if bias is not None:
            result = add_bias(result, bias)
    # No adapter has a rank.
    return base(x) if result is None else result


def few(base: nn.Module, weight: Tensor, bias: Tensor | None, adapter: LowRank) -> Few | None:
    """Return how a plain linear layer with one adapter runs few rows, or None if operators always do.

    Args:
        base: The layer.
        weight: Its weight, (out, in).
        bias: Its bias, (out,), or None.
        adapter: The adapter.
    """
    a, b, scale, gate, extra, p, magnitude, _, of_inputs = adapter
    if p > 0 or extra is not None or of_inputs:
        return None
    if magnitude is not None:
        return dora.few(weight, bias, base, adapter)
    return Few(lambda x: low_rank_few(x, weight, bias, a, b, scale, gate), FEW)


def add(result: Tensor, x: Tensor, adapter: LowRank) -> Tensor:
    """Add an adapter without magnitudes to the output of a linear layer, (..., out), whose input was x, (..., in)."""
    a, b, scale, gate, bias, p = adapter[:6]
    if a.shape[0] > 0:
        result = F.low_rank_add(result, x.to(result.dtype), a, b, scale, gate=gate, dropout_p=p)
    return result if bias is None else add_bias(result, bias)


def add_called(
    result: Tensor, x: Tensor, first: nn.Module, second: nn.Module, scale: float | Tensor, dropout_p: float
) -> Tensor:
    """Add an adapter by calling its two modules, for those who listen to them or have replaced them.

    Args:
        result: The output of the layer.
        x: Its input.
        first: The module of A, a linear layer or a convolution.
        second: That of B, its bias included.
        scale: The factor.
        dropout_p: The probability with which an element of the input is dropped.
    """
    # What is stored in another dtype is cast by whoever stores it so, and x is not rounded to that.
    x = x.to(next((p.dtype for p in first.parameters() if p.dtype in DENSE), x.dtype))
    added = second(first(tf.dropout(x, dropout_p) if dropout_p > 0 else x)) * scale
    return result + added.to(result.dtype)


def inputs_scaled(base: nn.Module, x: Tensor, adapters: Sequence[LowRank], dim: int = -1) -> tuple[Tensor, Any]:
    """Scale the input by magnitudes of inputs where an adapter has them; return it, and the adapters without them."""
    if not any(adapter.of_inputs for adapter in adapters):
        return x, adapters
    dora.check_alone(adapters)
    adapter = adapters[0]
    x = F.scale_channels(x, dora.gain_of(base, adapter), dim=dim)
    return x, [adapter._replace(magnitude=None, kept=None, of_inputs=False)]


def _with_magnitudes(
    base: nn.Module, x: Tensor, adapters: Sequence[LowRank], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    if any(adapter.of_inputs for adapter in adapters):
        return linear(base, *inputs_scaled(base, x, adapters), args, kwargs)
    if len(adapters) == 1 and not base.training and unobserved():
        plain = plain_tensors(base, x, args, kwargs)
        short = None if plain is None else few(base, *plain, adapters[0])
        if short is not None and (y := short.run(x)) is not None:
            return y
    result = call(base, x, *args, **kwargs)
    x = x.to(result.dtype)
    for adapter in adapters:
        apart = adapter.magnitude is None
        result = add(result, x, adapter) if apart else dora.rescale_linear(base, result, x, adapter)
    return result


def linear_mixed(
    base: nn.Module,
    x: Tensor,
    adapters: Sequence[LowRank],
    choice: Sequence[int],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = NONE,
) -> Tensor:
    """Return the output of a linear layer on a batch whose samples have different adapters, also for training them all.

    Args:
        base: As in `linear`.
        x: (batch, ..., in).
        adapters: Those that occur in the batch; their gates and magnitudes have no meaning here.
        choice: For every sample the index of its adapter, or -1 for none.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    result = call(base, x, *args, **kwargs)
    x = x.to(result.dtype)
    if adapters and x.numel():
        result = _add_by_sample(result, x, adapters, choice)
    bias = mixed_bias(adapters, range(len(adapters)), choice, result, result.shape[-1])
    return result if bias is None else result + bias.view(len(x), *[1] * (x.dim() - 2), -1)


def _add_by_sample(result: Tensor, x: Tensor, adapters: Sequence[LowRank], choice: Sequence[int]) -> Tensor:
    """Add to the output of every sample the low-rank product of its own adapter, all as groups of rows."""
    rank, samples = max(1, *(adapter.a.shape[0] for adapter in adapters)), len(x)
    rows = x.numel() // (samples * x.shape[-1])
    groups = [(index, len(list(run))) for index, run in itertools.groupby(choice)]
    # A group has factors of its own: of many short ones, copies of factors cost more than sorting the samples.
    order = None
    if len(groups) * rank > 2 * samples * rows:
        order = sorted(range(samples), key=lambda sample: (choice[sample] < 0, choice[sample]))
        groups = [(i, len(list(run))) for i, run in itertools.groupby(choice[sample] for sample in order)]
    if groups[-1][0] < 0:
        # The last rows may belong to no group.
        groups.pop()
    if not groups:
        return result
    chosen = [adapters[index] if index >= 0 else None for index, _ in groups]
    a = _stacked([None if one is None else one.a for one in chosen], rank, 0)
    b = _stacked([None if one is None else one.b for one in chosen], rank, 1)
    scales = [1.0 if one is None else one.scale for one in chosen]
    scale = scales[0]
    if any(other is not scale and other != scale for other in scales):
        wide = torch.promote_types(b.dtype, torch.float32)
        scale = torch.stack([torch.as_tensor(s, dtype=wide).to(x.device).reshape(()) for s in scales])
    ends = list(itertools.accumulate(count * rows for _, count in groups))
    offsets = torch.tensor(ends, device=x.device)
    seen = (x if order is None else x[order]).reshape(-1, x.shape[-1])
    seen = _dropped_by_group(seen, ends, [0.0 if one is None else one.dropout_p for one in chosen])
    if order is None:
        flat = result.reshape(-1, result.shape[-1])
        return F.grouped_low_rank_add(flat, seen, a, b, offsets, scale).view(result.shape)
    zeros = result.new_zeros(len(seen), result.shape[-1])
    added = F.grouped_low_rank_add(zeros, seen, a, b, offsets, scale).view(result.shape)
    back = sorted(range(samples), key=order.__getitem__)
    return result + added[back]


def _stacked(factors: Sequence[Tensor | None], rank: int, dim: int) -> Tensor:
    """Stack factors, with zeros up to a common rank in one dimension; of an adapter that is none, all zeros."""
    found = [factor for factor in factors if factor is not None]
    dtype = functools.reduce(torch.promote_types, {factor.dtype for factor in found})
    shape = [*found[0].shape]
    shape[dim] = rank
    parts = []
    for factor in factors:
        missing = rank - (0 if factor is None else factor.shape[dim])
        if factor is None:
            factor = found[0].new_zeros(shape)
        elif missing:
            factor = tf.pad(factor, (0, 0, 0, missing) if dim == 0 else (0, missing))
        parts.append(factor.to(dtype))
    return torch.stack(parts)


def _dropped_by_group(x: Tensor, ends: Sequence[int], probabilities: Sequence[float]) -> Tensor:
    """Drop elements of the rows of each group with its own probability."""
    if not any(probabilities):
        return x
    sizes = [end - start for start, end in zip([0, *ends], [*ends, len(x)], strict=False)]
    parts = zip(x.split(sizes), [*probabilities, 0.0], strict=True)
    return torch.cat([tf.dropout(part, p) if p > 0 else part for part, p in parts])


def mixed_groups(adapters: Sequence[LowRank]) -> list[list[int]]:
    """Return the indices of adapters in groups whose ranks together are small."""
    groups: list[list[int]] = []
    total = MIXED_RANK
    for index, adapter in enumerate(adapters):
        rank = adapter.a.shape[0]
        total += rank
        if total > MIXED_RANK:
            groups.append([])
            total = rank
        groups[-1].append(index)
    return groups


def side_by_side(adapters: Sequence[LowRank], group: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return A (total rank, in) and B (out, total rank) of a group of adapters; those of a single one as they are."""
    if len(group) == 1:
        return adapters[group[0]].a, adapters[group[0]].b
    return torch.cat([adapters[i].a for i in group]), torch.cat([adapters[i].b for i in group], dim=1)


def mixed_gate(adapters: Sequence[LowRank], group: Sequence[int], choice: Sequence[int], like: Tensor) -> Tensor:
    """Return one row for each sample, (batch, total rank): its adapter's scale where that adapter's rank stands."""
    ranks = [adapters[i].a.shape[0] for i in group]
    scales = [(index, adapters[index].scale) for index in group]
    rows = [[scale if index == chosen else 0.0 for index, scale in scales] for chosen in choice]
    gate = torch.tensor(rows, dtype=like.dtype, device=like.device)
    if len(group) == 1:
        return gate.expand(-1, ranks[0])
    return gate[:, [column for column, rank in enumerate(ranks) for _ in range(rank)]]


def mixed_bias(
    adapters: Sequence[LowRank], group: Sequence[int], choice: Sequence[int], like: Tensor, out: int
) -> Tensor | None:
    """Return what the adapters of a group add to the output of every sample, (batch, out), or None if nothing."""
    biases = [adapters[i].bias for i in group]
    if all(bias is None for bias in biases):
        return None
    rows = [like.new_zeros(out) if bias is None else bias.to(like) for bias in (*biases, None)]
    return torch.stack(rows)[_row_of_each(group, choice, like)]


def _row_of_each(group: Sequence[int], choice: Sequence[int], like: Tensor) -> Tensor:
    # The last row is that of samples whose adapter is none or in another group.
    row = {index: i for i, index in enumerate(group)}
    return torch.tensor([row.get(index, len(group)) for index in choice], device=like.device)


def update(adapter: LowRank, dtype: torch.dtype | None = None) -> Tensor:
    """Return the dense update with the outputs as rows, (out, in ...), without magnitudes, in the factors' dtype."""
    a, b, scale, gate = adapter[:4]
    shape = b.shape[0], *a.shape[1:]
    a, b = (t.flatten(1) if dtype is None else t.flatten(1).to(dtype) for t in (a, b))
    return (((b if gate is None else b * gate.to(b.dtype)) @ a) * scale).view(shape)


def merged(
    weight: Tensor, bias: Tensor | None, adapter: LowRank, own: Tensor | None = None, own_bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias with an adapter in them.

    Args:
        weight: (out, in) or (out, in, *kernel); in it may be what adapters before this one have made.
        bias: (out,) or None.
        adapter: The adapter.
        own: The weight of the layer itself, of which magnitudes are the norms; that in `weight` if it is None.
        own_bias: Its bias, likewise.
    """
    delta = update(adapter, weight.dtype)
    result = weight + delta
    if adapter.magnitude is not None:
        adapted = (weight if own is None else own.to(weight)) + delta
        rows, places = (adapted.transpose(0, 1), [1, -1]) if adapter.of_inputs else (adapted, [-1, 1])
        g = dora.gain(adapter.magnitude.to(weight.dtype), rows.flatten(1).norm(dim=1))
        result = result * g.view(*places, *[1] * (weight.dim() - 2))
        if bias is not None and not adapter.of_inputs:
            # As in the forward pass, the bias of the layer is not scaled, but what adapters have added to it is.
            kept = bias if own_bias is None else own_bias.to(bias)
            added = bias - kept
            bias = kept + g * added if added.any() else bias
    if adapter.bias is not None and bias is not None:
        bias = bias + adapter.bias.to(bias.dtype)
    return result, bias
