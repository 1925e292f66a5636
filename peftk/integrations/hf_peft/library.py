"""PEFT as a whole: its layers in a model, and its classes in a process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..exchange import exchange as exchange_class
from ..exchange import original_class
from ..exchange import restore as restore_class
from ..fingerprints import name_of, resolve
from ..way import Way
from ..ways import ways_of
from . import xlora
from .tuner_layer import FINGERPRINTS as FINGERPRINTS

NAME = "peft"
SHOWN = "PEFT"
MAKE = "peft.get_peft_model"

_PROMPTS = "peft.tuners.adaption_prompt.layer."


def ways() -> dict[str, type[Way]]:
    """Return the way of every class of layers, by the dotted name of the class."""
    return ways_of(__name__.rpartition(".")[0])


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return PEFT's layers in a model, with the paths of those."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.named_modules():
        name = name_of(original_class(module))
        # Those of this package are registered as such layers, for libraries that ask.
        if name in ways() or _PROMPTS in name or (isinstance(module, BaseTunerLayer) and not name.startswith("peftk.")):
            yield path, module


def holder(layer: nn.Module) -> tuple[Any, type]:
    """Return what runs a layer, which X-LoRA replaces, and its class."""
    owner = xlora.replaced(layer)
    return (layer, original_class(layer)) if owner is None else (owner, type(owner))


def foreign(layer: nn.Module) -> str | None:
    """Say who has replaced the `forward` of a layer, or return None."""
    if "forward" not in layer.__dict__ or xlora.replaced(layer) is not None:
        return None
    return "another library has replaced `forward` of the layer; accelerate the model before that"


def state(layer: nn.Module) -> Callable[[], None]:
    """Return a function that lets a layer run as it does now."""
    cls, forward = type(layer), layer.__dict__.get("forward")

    def put_back() -> None:
        layer.__class__ = cls
        if forward is not None:
            layer.__dict__["forward"] = forward

    return put_back


def exchange(layer: nn.Module, way: Way) -> None:
    """Let a layer run in a way."""
    (exchange_class if xlora.replaced(layer) is None else xlora.exchange)(layer, way)


def restore(layer: nn.Module) -> bool:
    """Let a layer run as PEFT has it; say whether it did not."""
    own = xlora.restore(layer)
    return restore_class(layer) or own


def classes() -> Iterator[tuple[str, type[nn.Module]]]:
    """Return every class of layers that this version of PEFT and the libraries beside it have."""
    from peft.import_utils import is_bnb_available

    for name in ways():
        module = name.rpartition(".")[0]
        if module.endswith(".bnb") and module not in sys.modules and not is_bnb_available():
            continue
        try:
            yield name, resolve(name)
        except (AttributeError, ImportError):
            # Older versions have classes of their own for quantised layers, and some need bitsandbytes or torchao.
            continue
