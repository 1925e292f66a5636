"""Finding the ways of a library: every class in its package here that names the layers it runs."""

from __future__ import annotations

import functools
import importlib
import pkgutil

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


__all__ = ["ways_of"]
