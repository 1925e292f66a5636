"""The kinds of layers that an adapter can wrap."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import PeftConfig

KINDS = {
    "Linear": "nn.Linear",
    "Conv1D": "transformers' Conv1D",
    "Conv2d": "nn.Conv2d",
    "Embedding": "nn.Embedding",
}
"""The kinds of layers that an adapter can wrap, and what messages call them."""


def kind_of(layer: nn.Module) -> str | None:
    """Return which of `KINDS` a layer is, or None.

    Conv1D is the linear layer of GPT-2, which stores its weight as (in, out).
    """
    for kind in ("Linear", "Conv2d", "Embedding"):
        if isinstance(layer, getattr(nn, kind)):
            return kind
    if type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers."):
        return "Conv1D"
    return None


def features_of(layer: nn.Module) -> tuple[int, int]:
    """Return the input and output size of a layer: its features or channels."""
    names = {
        "Linear": ("in_features", "out_features"),
        "Conv1D": ("nx", "nf"),
        "Conv2d": ("in_channels", "out_channels"),
        "Embedding": ("num_embeddings", "embedding_dim"),
    }[kind_of(layer)]
    return getattr(layer, names[0]), getattr(layer, names[1])


def settle_fan_in_fan_out(config: PeftConfig, layer: nn.Module) -> None:
    """Set `config.fan_in_fan_out` to what the layer is, with a warning if that is a change, as PEFT does."""
    stored = kind_of(layer) == "Conv1D"
    if config.fan_in_fan_out != stored:
        reason = "stores its weight as (in, out)" if stored else "does not store its weight as (in, out)"
        warnings.warn(f"fan_in_fan_out: {KINDS[kind_of(layer)]} {reason}; it is set to {stored}", stacklevel=2)
        config.fan_in_fan_out = stored


def why_unsupported(layer: nn.Module, kinds: Sequence[str] = tuple(KINDS)) -> str | None:
    """Say why an adapter for these kinds of layers cannot wrap `layer`, or return None if it can."""
    if kind_of(layer) not in kinds:
        return f"only {', '.join(KINDS[kind] for kind in kinds)} {'is' if len(kinds) == 1 else 'are'} supported"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this layer's weight and never calls it, so an adapter would be ignored"
    weight = layer.weight
    if type(weight) is not nn.Parameter and type(weight).__name__ != "DTensor" and type(weight) is not Tensor:
        return f"its weight is a {type(weight).__name__}; only dense floating-point weights are supported"
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {weight.dtype}; float64, float32, bfloat16 and float16 are supported"
    return None
