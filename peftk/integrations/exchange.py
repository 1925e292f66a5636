"""The class of a layer, exchanged for one with another `forward` and back; everything else of it stays."""

from __future__ import annotations

import copy
import copyreg
import functools
from typing import Any

from torch import nn

from .way import SHORTCUTS, Forward, Way, forward_of

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
    SHORTCUTS.pop(layer, None)
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


def wrapped(original: Forward, way: Way, only: list[type] | None = None) -> Any:
    """Return a `forward` for a class that runs in a way what it takes, and everything else in the class's own.

    Hooks of another library, and layers that hold it as a bound method, may keep the function beyond the time at which
    it was asked for: it goes the library's own way then.

    Args:
        original: The `forward` of the library's class.
        way: The way.
        only: A list of one class, of which a layer must be. None for all layers until `switch_off`.
    """
    live = [True]

    def here(layer: Any) -> bool:
        return live[0] if only is None else type(layer) is only[0]

    made: Any = functools.wraps(original)(way.around(original, here))
    made._peftk_original, made._peftk_live = original, live
    return made


def switch_off(function: Any) -> None:
    """Let a function of `wrapped`, or a method bound to it, go the library's own way from now on."""
    function._peftk_live[0] = False
    # They would keep parameters in memory that their layers may lose. Others find theirs again.
    SHORTCUTS.clear()


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
