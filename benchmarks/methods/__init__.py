"""What the benchmark of the layers knows about each method; the file of its name says it, in `METHODS`."""

from __future__ import annotations

import importlib
import pkgutil

from ._method import SCALE, Cell, Method, Values

_FILES = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
METHODS: dict[str, Method] = {
    # LoRA is what the others are compared with.
    method.name: method
    for file in sorted(_FILES, key=lambda file: not file.__name__.endswith(".lora"))
    for method in getattr(file, "METHODS", ())
}
"""Every method by its name, in the order of the report."""

NOT_TIMED: dict[str, str] = {config: why for file in _FILES for config, why in getattr(file, "NOT_TIMED", {}).items()}
"""The configurations of methods that have no row, and why."""


def available() -> dict[str, Method]:
    """Return the methods that this version of peftk has."""
    return {name: method for name, method in METHODS.items() if method.why_missing() is None}


__all__ = ["METHODS", "NOT_TIMED", "SCALE", "Cell", "Method", "Values", "available"]
