"""The kinds of layers that an adapter can wrap."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .config import PeftConfig

KINDS = {
    "Linear": "nn.Linear",
    "Conv1D": "transformers' Conv1D",
    "Conv2d": "nn.Conv2d",
    "Embedding": "nn.Embedding",
}
"""The kinds of layers that an adapter can wrap, and what messages call them."""

QUANTISERS = ("torchao", "bnb 4bit", "bnb 8bit")
"""What PEFT calls the libraries whose quantised layers are told apart by name."""

_NAMES = ("float64", "float32", "bfloat16", "float16")
HALF = (torch.float16, torch.bfloat16)
_DENSE = tuple(getattr(torch, name) for name in _NAMES)


def kind_of(layer: nn.Module) -> str | None:
    """Return which of `KINDS` a layer is, or None.

    Conv1D is the linear layer of GPT-2, which stores its weight as (in, out).
    """
    for kind in ("Linear", "Conv2d", "Embedding"):
        if isinstance(layer, getattr(nn, kind)):
            return kind
    # Without importing transformers; a parametrized layer is of a class of its own.
    found = any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(layer).__mro__)
    return "Conv1D" if found else None


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


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape that the weight of a linear layer or a convolution has when it is dense; it may be packed."""
    return features_of(layer)[::-1] if kind_of(layer) == "Linear" else tuple(layer.weight.shape)


def opaque_weight(layer: nn.Module) -> str | None:
    """Name the type of a weight that is not dense and floating-point, as a quantised one, or return None if it is."""
    weight = layer.weight
    if type(weight) is not nn.Parameter and type(weight).__name__ != "DTensor" and type(weight) is not Tensor:
        return type(weight).__name__
    return None if weight.dtype in _DENSE else str(weight.dtype)


def quantised_by(layer: nn.Module) -> str | None:
    """Return what quantised the weight of a layer, in PEFT's words or as the type of the weight, or None."""
    if kind_of(layer) is None:
        return None
    name = opaque_weight(layer)
    if type(layer.weight).__module__.partition(".")[0] == "torchao":
        return "torchao"
    return {"Params4bit": "bnb 4bit", "Int8Params": "bnb 8bit"}.get(name, name)


def dtype_of(layer: nn.Module) -> torch.dtype:
    """Return the dtype in which an adapter is initialised: that of the weight, or float32 if it is stored in another.

    A layer with packed weights may say in `compute_dtype` what it computes in, as those of bitsandbytes do.
    """
    dtype = layer.weight.dtype
    if hasattr(layer, "compute_dtype") and opaque_weight(layer) is not None:
        dtype = layer.compute_dtype
    return dtype if dtype in _DENSE else torch.float32


def call(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call a linear base layer.

    Raises:
        RuntimeError: The layer is quantised, and x needs a gradient that its backward pass does not give.
    """
    result = layer(x, *args, **kwargs)
    if x.requires_grad and not result.requires_grad and torch.is_grad_enabled() and opaque_weight(layer) is not None:
        raise RuntimeError(
            f"base_layer: this {type(layer).__name__}, whose weight is {opaque_weight(layer)}, passes no gradient to "
            "its input, so what comes before it would be trained wrongly; quantise weights alone and not activations, "
            "or run it under torch.no_grad()"
        )
    return result


def why_unsupported(layer: nn.Module, kinds: Sequence[str] = tuple(KINDS)) -> str | None:
    """Say why an adapter for these kinds of layers cannot wrap `layer`, or return None if it can.

    A linear layer may store its weight as it likes, as long as calling it works: adapters there only call it.
    """
    kind = kind_of(layer)
    if kind not in kinds:
        return f"only {', '.join(KINDS[kind] for kind in kinds)} {'is' if len(kinds) == 1 else 'are'} supported"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this layer's weight and never calls it, so an adapter would be ignored"
    opaque = opaque_weight(layer)
    if opaque is None:
        return None
    if is_lazy(layer.weight):
        return f"its weight is an {opaque}; it is supported once a forward pass has given it a shape"
    if kind != "Linear":
        return f"its weight is {opaque}; weights that are not dense and floating-point are supported on nn.Linear only"
    if type(layer.weight) is nn.Parameter and type(layer).forward is nn.Linear.forward:
        return f"its weight is {opaque}, which nn.Linear does not multiply by; {', '.join(_NAMES)} are supported"
    return None
