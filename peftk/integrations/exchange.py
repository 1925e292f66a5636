"""The class of a layer, exchanged for one with another `forward` and back; everything else of it stays."""

from __future__ import annotations

import copy
import copyreg
import functools
from typing import Any

from torch import nn

from .way import Forward, Way, forward_of

ORIGINAL = "_peftk_of"
"""The attribute of an exchanged class that holds the library's own."""


def original_class(layer: nn.Module) -> Any:
    """Return the library's class of a layer, exchanged or not."""
    return type(layer).__dict__.get(ORIGINAL, type(layer))


def exchange(layer: nn.Module, way: Way) -> None:
    """Give a layer the class that runs it in a way."""
    own = original_class(layer)
    layer.__class__ = exchanged_class(own, forward_of(own), way)


def restore(layer: nn.Module) -> bool:
    """Give a layer its own class back; say whether it had another one."""
    own = original_class(layer)
    if own is type(layer):
        return False
    layer.__class__ = own
    return True


@functools.cache
def exchanged_class(cls: Any, original: Forward, way: Way) -> type[nn.Module]:
    """Return the subclass of a library's class that runs in a way: of the same name, for `repr` and for pickles."""
    mine: list[type] = []
    body = {
        "forward": wrapped(original, way, mine),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce_ex,
        "__deepcopy__": _deepcopy,
        ORIGINAL: cls,
    }
    meta: Any = type(cls)
    mine.append(meta(cls.__name__, (cls,), body))
    return mine[0]


def wrapped(original: Forward, way: Way, only: list[type] | None = None) -> Forward:
    """Return a `forward` for a class that runs in a way what it takes, and everything else in the class's own.

    Args:
        original: The `forward` of the library's class.
        way: The way.
        only: A list of one class, of which a layer must be for the way to be taken: a hook of another library may keep
            this function beyond the time at which the layer got its own class back. None for all layers.
    """
    made: Any = functools.wraps(original)(way.around(original, only))
    made._peftk_original = original
    return made


def _reduce_ex(self: Any, protocol: Any) -> Any:
    # A pickle names the library's class, so that it loads without this package. `object.__reduce_ex__` insists on
    # the class of the object.
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    make: Any = copyreg
    return make._reconstructor, (original_class(self), object, None), state


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    own = original_class(self)
    new = own.__new__(own)
    memo[id(self)] = new
    state = {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
    new.__setstate__(state)
    new.__class__ = type(self)
    return new
