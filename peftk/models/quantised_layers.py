"""Dense layers in place of quantised ones, for adapters that are merged for good, and quantised ones again."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..methods._base_layer import DENSE, opaque_weight
from ..methods._quantised import dequantised, readable, requantisable, requantised
from ..nn.base.adapter_layer import AdapterLayer
from ..nn.base.kinds import HALF
from .names import unwrapped
from .plan import replace_module


class Replaced(NamedTuple):
    """A quantised layer and the dense one that stands in its place."""

    path: str
    old: Any
    dense: nn.Linear


def make_dense(model: nn.Module, layers: Mapping[str, AdapterLayer], again: bool) -> list[Replaced]:
    """Put a dense nn.Linear into those of these adapted layers whose quantised weight can be read.

    Args:
        model: The base model; the most frequent dtype of its other weights is that of a layer that does not say.
        layers: Path to layer.
        again: Whether `quantise_again` is to follow.

    Returns:
        What was replaced.

    Raises:
        ValueError: It is to follow, and the library of a layer does not offer it.
    """
    opaque = {path: layer for path, layer in layers.items() if opaque_weight(layer.base_layer) is not None}
    quantised = {path: layer for path, layer in opaque.items() if readable(layer.base_layer)}
    for path, layer in quantised.items() if again else ():
        if not requantisable(layer.base_layer):
            raise ValueError(
                f"requantise: expected layers that bitsandbytes has quantised; the weight of {path!r} is "
                f"{opaque_weight(layer.base_layer)}, which does not say how to quantise another one. Pass "
                "dequantise=True, and quantise the merged model"
            )
    if not quantised:
        return []
    usual = _usual_dtype(model)
    replaced = []
    for path, layer in quantised.items():
        old, layer.base_layer = layer.base_layer, _dense(layer.base_layer, usual)
        replaced.append(Replaced(path, old, layer.base_layer))
    if not again and getattr(getattr(unwrapped(model), "config", None), "quantization_config", None) is not None:
        warnings.warn(
            f"dequantise: {len(quantised)} layers are dense now, and the configuration of the model still has a "
            "quantization_config; take it out before the model is saved",
            stacklevel=4,
        )
    return replaced


@torch.no_grad()
def quantise_again(model: nn.Module, replaced: Sequence[Replaced]) -> None:
    """Put quantised layers back into the places of dense ones, with the merged weights, and warn of what is lost.

    What rounding loses is said as a share of what merging has changed: a share of 1 is as much as the adapter itself.
    """
    lost = {}
    for path, old, dense in replaced:
        new = requantised(old, dense.weight)
        if dense.bias is not None and dense.bias is not old.bias:
            new._parameters["bias"] = nn.Parameter(dense.bias.detach().to(old.bias.dtype), requires_grad=False)
        changed = torch.linalg.vector_norm(dense.weight.float() - dequantised(old).float())
        error = torch.linalg.vector_norm(dequantised(new).float() - dense.weight.float())
        lost[path] = float(error / changed) if changed else 0.0
        replace_module(model, path, new)
    if lost:
        worst = max(lost, key=lost.__getitem__)
        warnings.warn(
            f"requantise: of what merging has changed in {len(lost)} layers, rounding loses a share of "
            f"{statistics.median(lost.values()):.2f} (the median), and of {lost[worst]:.2f} in {worst!r}",
            stacklevel=4,
        )


def _usual_dtype(model: nn.Module) -> torch.dtype:
    inner = {id(p) for m in model.modules() if isinstance(m, AdapterLayer) for p in m.parameters()}
    counted = Counter(p.dtype for p in model.parameters() if id(p) not in inner and p.dtype in DENSE)
    return counted.most_common(1)[0][0] if counted else torch.get_default_dtype()


def _dense(base: Any, usual: torch.dtype) -> nn.Linear:
    weight = dequantised(base)
    # What 8 bits stand for is a product with float32 scales, whatever the model computes in.
    dtype = usual if weight.dtype is torch.float32 and usual in HALF else weight.dtype
    layer = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if base.bias is not None:
        layer.bias = base.bias if base.bias.dtype is dtype else nn.Parameter(base.bias.detach().to(dtype), False)
    return layer.train(base.training)


__all__ = ["make_dense", "quantise_again"]
