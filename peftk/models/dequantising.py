"""Dense layers in place of quantised ones, for adapters that are merged for good."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..methods._base_layer import DENSE, opaque_weight
from ..methods._quantised import dequantised, readable
from ..nn.base.adapter_layer import AdapterLayer
from ..nn.base.kinds import HALF
from .names import unwrapped


def make_dense(model: nn.Module, layers: Sequence[AdapterLayer]) -> None:
    """Put a dense nn.Linear into those of these adapted layers whose quantised weight can be read.

    Args:
        model: The base model; the most frequent dtype of its other weights is that of a layer that does not say.
        layers: The layers.
    """
    opaque = [layer for layer in layers if opaque_weight(layer.base_layer) is not None]
    quantised = [layer for layer in opaque if readable(layer.base_layer)]
    if not quantised:
        return
    usual = _usual_dtype(model)
    for layer in quantised:
        layer.base_layer = _dense(layer.base_layer, usual)
    if getattr(getattr(unwrapped(model), "config", None), "quantization_config", None) is not None:
        warnings.warn(
            f"dequantise: {len(quantised)} layers are dense now, and the configuration of the model still has a "
            "quantization_config; take it out before the model is saved",
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


__all__ = ["make_dense"]
