"""AdapterHub's `adapters` as a whole: its layers with LoRA in a model, and its classes in a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..exchange import exchange, original_class, restore
from ..fingerprints import resolve
from ..way import Way
from ..ways import ways_of
from .lora_linear import FINGERPRINTS as FINGERPRINTS

NAME = "adapters"
SHOWN = "AdapterHub"
MAKE = "model.add_adapter with a LoRAConfig of adapters"


def ways() -> dict[str, type[Way]]:
    """Return the way of every class of layers, by the dotted name of the class."""
    return ways_of(__name__.rpartition(".")[0])


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the layers of a model that have adapters of a kind that is added or scaled, with their paths."""
    from adapters.methods.adapter_layer_base import AdapterLayerBase
    from adapters.methods.lora import LoRALayer

    for path, module in model.named_modules():
        if isinstance(module, LoRALayer):
            if len(module.loras):
                yield path, module
        elif isinstance(module, AdapterLayerBase) and len(module.adapter_modules):
            yield path, module


def holder(layer: nn.Module) -> tuple[Any, type]:
    """Return what runs a layer, and its class."""
    return layer, original_class(layer)


def foreign(layer: nn.Module) -> str | None:
    """Say who has replaced the `forward` of a layer, or return None."""
    if "forward" in layer.__dict__:
        return "another library has replaced `forward` of the layer; accelerate the model before that"
    return None


def state(layer: nn.Module) -> Callable[[], None]:
    """Return a function that lets a layer run as it does now."""
    cls = type(layer)

    def put_back() -> None:
        layer.__class__ = cls

    return put_back


def classes() -> Iterator[tuple[str, type[nn.Module]]]:
    """Return every class of layers that this version of AdapterHub has."""
    for name in ways():
        yield name, resolve(name)


__all__ = ["classes", "exchange", "foreign", "holder", "layers_of", "restore", "state", "ways"]
