"""Finding the ways of a library: every class in its package here that names the layers it runs."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from .way import Way


@functools.cache
def ways_of(package: str) -> dict[str, type[Way]]:
    """Return the way of every class of layers, by the dotted name of the class.

    Args:
        package: The package of the library here, whose modules are looked through.
    """
    found: dict[str, type[Way]] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        for value in vars(importlib.import_module(f"{package}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Way) and "layers" in value.__dict__:
                found.update(dict.fromkeys(value.layers, value))
    return found


def way_of(library: Any, name: str, correct: bool, force: bool) -> Way | str:
    """Return how the layers of a class run, or why they are left to their library.

    Args:
        library: The module that knows the library as a whole: `ways`, `NAME`, `SHOWN` and `FINGERPRINTS`.
        name: The dotted name of the class.
        correct: See `Way`.
        force: See `Way`.
    """
    kind = library.ways().get(name)
    if kind is None:
        own = name.startswith(f"{library.NAME}.")
        return "no arithmetic for this class" if own else f"a class that is not {library.SHOWN}'s, {name}"
    made: Way = kind(library.FINGERPRINTS, correct=correct, force=force)
    return made.unknown((f"{name}.forward", *made.copied)) or made


__all__ = ["way_of", "ways_of"]
