"""The weights that quantised linear layers stand for, by the rules of the libraries that quantised them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ._base_layer import opaque_weight


def readable(layer: Any) -> bool:
    """Whether the weight of a linear layer is dense, or quantised by a library whose rules are known."""
    return opaque_weight(layer) is None or _library(layer) is not None


def _library(layer: Any) -> str | None:
    kind = type(layer.weight)
    library = kind.__module__.partition(".")[0]
    if library == "torchao" and hasattr(layer.weight, "dequantize"):
        return library
    return library if library == "bitsandbytes" and kind.__name__ in ("Params4bit", "Int8Params") else None


@torch.no_grad()
def dequantised(layer: Any) -> Tensor:
    """Return the dense weight of a linear layer, (out, in), in the dtype that its library gives it.

    Raises:
        NotImplementedError: The rules are not known.
    """
    weight, library = layer.weight, _library(layer)
    if opaque_weight(layer) is None:
        return weight.detach()
    if library == "torchao":
        return weight.dequantize().detach()
    if library is None:
        raise NotImplementedError(f"base_layer: its weight is {opaque_weight(layer)}, of which nothing dense is known")
    return _four_bits(weight) if type(weight).__name__ == "Params4bit" else _eight_bits(layer)


def requantisable(layer: Any) -> bool:
    """Whether a library offers to quantise a linear layer's weight as it was, which of torchao's does not say how."""
    return _library(layer) == "bitsandbytes"


@torch.no_grad()
def requantised(layer: Any, weight: Tensor) -> Any:
    """Return a layer like one that bitsandbytes has quantised, with another weight, (out, in), quantised in its way."""
    import bitsandbytes

    theirs: Any = bitsandbytes
    old = layer.weight
    kind: Any = type(layer)
    new = kind.__new__(kind)
    new.__dict__.update(layer.__dict__)
    new._parameters = dict(layer._parameters)
    if type(old).__name__ == "Params4bit":
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        how = {name: getattr(old, name) for name in names}
        new.quant_state = None
        made = theirs.nn.Params4bit(weight.cpu(), requires_grad=False, module=new, **how)
    else:
        made = theirs.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        new.state = theirs.MatmulLtState()
        new.state.threshold, new.state.has_fp16_weights = layer.state.threshold, layer.state.has_fp16_weights
    new._parameters["weight"] = made.to(old.device)
    return new


def _four_bits(weight: Any) -> Tensor:
    from bitsandbytes import functional

    data, state = weight.data, weight.quant_state
    if state is None:
        # It is quantised when it reaches its device.
        return weight.data
    if getattr(state, "packing_format_for_cpu", False):
        # It writes into the state that it is given, and the weight of the layer stays packed.
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    found: Tensor = functional.dequantize_4bit(data, state)
    return found.view(state.shape)


def _eight_bits(layer: Any) -> Tensor:
    weight, state = layer.weight, getattr(layer, "state", None)
    if weight.dtype.is_floating_point:
        return weight.data
    scales = weight.SCB if weight.SCB is not None else getattr(state, "SCB", None)
    if scales is None:
        raise NotImplementedError("base_layer: its weight has 8 bits and no scales, so that nothing dense is known")
    return weight.data * (scales.to(weight.device).view(-1, 1) / 127)


__all__ = ["dequantised", "readable", "requantisable", "requantised"]
