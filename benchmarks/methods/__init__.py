"""What the benchmark of the layers knows about each method; a method is written down in one class."""

from __future__ import annotations

from ._method import SCALE, Cell, Method, Values
from .additive import C3A, AdaLora, Dora, LoHa, LoKr, Lora
from .rotations import Boft, Oft

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Lora(),
        Dora(),
        AdaLora(),
        LoHa(),
        LoKr(),
        C3A(),
        Oft(neumann=False),
        Oft(neumann=True),
        Boft(),
    )
}
"""Every method by its name, in the order of the report."""


def available() -> dict[str, Method]:
    """Return the methods that this version of peftk has."""
    return {name: method for name, method in METHODS.items() if method.why_missing() is None}


__all__ = ["METHODS", "SCALE", "Cell", "Method", "Values", "available"]
