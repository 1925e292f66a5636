"""The short way of a layer through its own call, for a token or a few."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ...methods._base_layer import Few, plain_tensors, unobserved
from ...ops._few_rows import few
from ...ops.shortcut import Shortcut


class Shortened:
    """A layer that finds once what its call on few rows rests on, and asks in every call whether it still holds.

    A class takes part by `_few`. Whoever changes its `_adapted` changes both, or has no shortcut.
    """

    kind: str | None
    in_features: int
    adapter_layer_names: ClassVar[tuple[str, ...]]
    parameter_names: ClassVar[frozenset[str]]
    other_param_names: ClassVar[tuple[str, ...]]
    _shortcut: Shortcut | None

    def _few(self, name: str, weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        """Return how the layer runs few rows with one adapter, or None if as it runs many.

        What is returned holds no reference to the layer, which would then be freed late.

        Args:
            name: The adapter.
            weight: That of the base layer, a plain dense nn.Linear, (out, in).
            bias: Its bias, (out,), or None.
            rests: Takes note of what that rests on beside the settings and parameters of the adapter.
        """
        return None

    def _find_shortcut(self, x: Tensor, name: str) -> Shortcut | None:
        """Return how rows like x run as long as nothing about this layer and its one active adapter changes."""
        own: dict[str, Any] = self.__dict__
        modules = own["_modules"]
        base: nn.Module = modules["base_layer"]
        if self.kind != "Linear" or own["training"] or base.training:
            return None
        if _owner(self, "_few") != _owner(self, "_adapted"):
            return None
        if not few(x, self.in_features) or not unobserved():
            return None
        plain = plain_tensors(base, x)
        if plain is None:
            return None
        found = Shortcut(own)
        short = self._few(name, *plain, found)
        if short is None:
            return None
        found.rest_on(own, "training", "batch_adapters", "disable_adapters", "merged_adapters", "_strengths")
        found.rest_on(own, "_modules", "active_adapters", *self.other_param_names)
        found.rest_on_empty(own["merged_adapters"], own["_strengths"])
        found.rest_on_items(own["active_adapters"])
        for settings in self.other_param_names:
            found.rest_on(own[settings], name)
        found.rest_on(own[self.other_param_names[0]], *own["active_adapters"])
        found.rest_on(modules, "base_layer", *self.adapter_layer_names)
        found.rest_on_module(base)
        for container in self.adapter_layer_names:
            held = modules[container]
            found.rest_on(held._parameters if container in self.parameter_names else held._modules, name)
            part = held._modules.get(name)
            if part is not None:
                found.rest_on_module(part)
        return found if found.close(short.run, short.rows * self.in_features) else None


def _owner(layer: object, method: str) -> type | None:
    return next((c for c in type(layer).__mro__ if method in c.__dict__), None)
