"""LyCORIS as a whole: the modules of a network, those before the layers of a model, and its classes in a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..exchange import exchange as exchange_class
from ..exchange import original_class
from ..exchange import restore as restore_class
from ..fingerprints import resolve
from ..way import Way
from ..ways import ways_of
from .network_module import FINGERPRINTS as FINGERPRINTS

NAME = "lycoris"
SHOWN = "LyCORIS"
MAKE = "lycoris.create_lycoris"


def ways() -> dict[str, type[Way]]:
    """Return the way of every class of modules, by the dotted name of the class."""
    return ways_of(__name__.rpartition(".")[0])


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the modules of a network, and those that stand before the layers of a model, by their names."""
    from lycoris.modules.base import LycorisBaseModule

    seen: set[int] = set()
    for path, module in model.named_modules():
        # A network keeps its modules in a list, from which `apply_to` takes them into itself.
        listed = module.__dict__.get("loras", ())
        before = module.__dict__.get("_lycoris_wrappers", ())
        for found in (module, *(listed if isinstance(listed, list) else ()), *before):
            if isinstance(found, LycorisBaseModule) and id(found) not in seen:
                seen.add(id(found))
                yield getattr(found, "lora_name", "") or path, found


def holder(layer: nn.Module) -> tuple[Any, type]:
    """Return what runs a module, and its class."""
    return layer, original_class(layer)


def foreign(layer: Any) -> str | None:
    """Say who has replaced the `forward` of a module or of its layer, or return None."""
    if "forward" in layer.__dict__:
        return "another library has replaced `forward` of the module; accelerate the network before that"
    return None


def state(layer: Any) -> Callable[[], None]:
    """Return a function that lets a module run as it does now."""
    cls = type(layer)

    def put_back() -> None:
        layer.__class__ = cls
        _bind(layer)

    return put_back


def exchange(layer: Any, way: Way) -> None:
    """Let a module run in a way."""
    exchange_class(layer, way)
    _bind(layer)


def restore(layer: Any) -> bool:
    """Let a module run as LyCORIS has it; say whether it did not."""
    changed = restore_class(layer)
    _bind(layer)
    return changed


def _bind(layer: Any) -> None:
    """Bind the `forward` of a module again wherever LyCORIS has put it: into the layer, and into modules before it."""
    if layer.not_supported:
        return
    org = layer.org_module[0]
    if _is_its(org.__dict__.get("forward"), layer):
        org.forward = layer.forward
    for other in org.__dict__.get("_lycoris_wrappers", ()):
        if _is_its(other.org_forward, layer):
            other.org_forward = layer.forward


def _is_its(function: Any, layer: Any) -> bool:
    return getattr(function, "__self__", None) is layer and function.__name__ == "forward"


def classes() -> Iterator[tuple[str, type[nn.Module]]]:
    """Return every class of modules that this version of LyCORIS has."""
    for name in ways():
        yield name, resolve(name)
