"""The kinds of layers that an adapter can wrap."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ...methods._base_layer import DENSE, features_of, foreign_forward, kind_of, opaque_weight
from .config import PeftConfig
from .offloading import comes_and_goes

KINDS = {
    "Linear": "nn.Linear",
    "Conv1D": "transformers' Conv1D",
    "Conv1d": "nn.Conv1d",
    "Conv2d": "nn.Conv2d",
    "Conv3d": "nn.Conv3d",
    "Embedding": "nn.Embedding",
}
"""The kinds of layers that an adapter can wrap, and what messages call them."""

QUANTISERS = ("torchao", "bnb 4bit", "bnb 8bit")
"""What PEFT calls the libraries whose quantised layers are told apart by name."""

HALF = (torch.float16, torch.bfloat16)
_NAMES = [str(dtype).removeprefix("torch.") for dtype in DENSE]


def settle_fan_in_fan_out(config: PeftConfig, layer: nn.Module) -> None:
    """Set `config.fan_in_fan_out` to what the layer is, with a warning if that is a change, as PEFT does."""
    kind = kind_of(layer)
    stored = kind == "Conv1D"
    if config.fan_in_fan_out != stored:
        reason = "stores its weight as (in, out)" if stored else "does not store its weight as (in, out)"
        warnings.warn(
            f"fan_in_fan_out: {KINDS[kind] if kind else type(layer).__name__} {reason}; it is set to {stored}",
            stacklevel=2,
        )
        config.fan_in_fan_out = stored


def weight_shape(layer: Any) -> tuple[int, ...]:
    """Return the shape that the weight of a linear layer or a convolution has when it is dense; it may be packed."""
    return features_of(layer)[::-1] if kind_of(layer) == "Linear" else tuple(layer.weight.shape)


def core_shape(r: int, kernel: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the core of a Tucker form; PEFT writes one for an nn.Conv1d with a last dimension of one."""
    return (r, r, *kernel, 1) if len(kernel) == 1 else (r, r, *kernel)


def quantised_by(layer: nn.Module) -> str | None:
    """Return what quantised the weight of a layer, in PEFT's words or as the type of the weight, or None."""
    if kind_of(layer) is None:
        return None
    name = opaque_weight(layer) or ""
    if type(layer.weight).__module__.partition(".")[0] == "torchao":
        return "torchao"
    return {"Params4bit": "bnb 4bit", "Int8Params": "bnb 8bit"}.get(name, name) or None


def dtype_of(layer: Any) -> torch.dtype:
    """Return the dtype in which an adapter is initialised: that of the weight, or float32 if it is stored in another.

    A layer with packed weights may say in `compute_dtype` what it computes in, as those of bitsandbytes do.
    """
    dtype: torch.dtype = layer.weight.dtype
    if hasattr(layer, "compute_dtype") and opaque_weight(layer) is not None:
        dtype = layer.compute_dtype
    return dtype if dtype in DENSE else torch.float32


def why_unsupported(layer: Any, kinds: Sequence[str] = tuple(KINDS)) -> str | None:
    """Say why an adapter for these kinds of layers cannot wrap `layer`, or return None if it can.

    A linear layer may store its weight as it likes, as long as calling it works: adapters there only call it.
    """
    kind = kind_of(layer)
    if kind not in kinds:
        return f"only {', '.join(KINDS[kind] for kind in kinds)} {'is' if len(kinds) == 1 else 'are'} supported"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this layer's weight and never calls it, so an adapter would be ignored"
    foreign = foreign_forward(layer) if kind == "Embedding" else None
    if foreign is not None:
        return f"it has the forward of {foreign}, and only what looks up its argument as nn.Embedding does is supported"
    opaque = opaque_weight(layer)
    if opaque is None or (type(layer.weight) is nn.Parameter and comes_and_goes(layer)):
        # What a hook casts for each call may be stored in any dtype; it is looked at then.
        return None
    if is_lazy(layer.weight):
        return f"its weight is an {opaque}; it is supported once a forward pass has given it a shape"
    if kind != "Linear":
        return f"its weight is {opaque}; weights that are not dense and floating-point are supported on nn.Linear only"
    if type(layer.weight) is nn.Parameter and type(layer).forward is nn.Linear.forward:
        return f"its weight is {opaque}, which nn.Linear does not multiply by; {', '.join(_NAMES)} are supported"
    return None
