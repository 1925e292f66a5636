"""What a model holds, found in one walk: several times as fast as torch's generators inside of generators."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def all_modules(*roots: nn.Module | None) -> list[nn.Module]:
    """Return modules and everything inside of them, wrappers included, each once and in no particular order."""
    found: dict[nn.Module, None] = {}
    stack: list[nn.Module | None] = [*roots]
    while stack:
        module = stack.pop()
        if module is not None and module not in found:
            found[module] = None
            stack += module._modules.values()
    return [*found]


def all_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that these modules themselves hold, each once."""
    held = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    return [*held.values()]


__all__ = ["all_modules", "all_parameters"]
