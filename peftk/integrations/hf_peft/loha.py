"""PEFT's LoHa: linear layers and convolutions."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ...methods import loha
from ...methods._base_layer import opaque_weight, plain_tensors
from ...methods.loha import Hadamard
from ..way import Way
from .lora import scale_of
from .lycoris_layer import draws, unfit_base
from .tuner_layer import NONE_ACTIVE, SHARED, active, dense_weight, held, unfit

_LAYER = "peft.tuners.loha.layer"
_CONTAINERS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


class LoHaWay(Way):
    """Layers whose update is the product of two low-rank ones, entry by entry."""

    method = "loha"
    copied: ClassVar[tuple[str, ...]] = (
        *SHARED,
        f"{_LAYER}.LoHaLayer.get_delta_weight",
        f"{_LAYER}.HadaWeight.forward",
        f"{_LAYER}.HadaWeightCP.forward",
    )

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        containers = [held(layer._modules[name]) for name in _CONTAINERS]
        found: list[Any] = []
        parameters: list[Any] = []
        for name in active(layer, containers[0]):
            scale = scale_of(layer, name)
            if type(scale) is not float:
                return "a scale that is no number"
            w1_a, w1_b, w2_a, w2_b = (container[name] for container in containers[:4])
            t1, t2 = (container.get(name) for container in containers[4:])
            found.append((name, Hadamard(w1_a, w1_b, w2_a, w2_b, scale, t1, t2)))
            parameters += (p for p in (w1_a, w1_b, w2_a, w2_b, t1, t2) if p is not None)
        if not found:
            return NONE_ACTIVE
        return unfit_base(layer, x) or unfit(layer, x, parameters) or found

    def _drawn(self, layer: Any, adapters: list[Any]) -> list[Hadamard]:
        drawn = []
        names = [name for name, _ in adapters]
        for (_, one), (on, kept) in zip(adapters, draws(layer, names, layer.weight.shape[0]), strict=True):
            if kept is not None:
                rows = kept.to(one.w1_a.dtype)
                one = one._replace(rows=(rows / rows.mean()).to(one.w1_a.device))
            if on:
                drawn.append(one)
        return drawn

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        weight, one = dense_weight(layer), adapters[0][1]
        # The factors of the Tucker form are products.
        return None if weight is None or one.t1 is not None else (weight, *one[:4], 1.0)

    def note(self, layer: Any) -> str | None:
        """See `Way.note`."""
        if not layer._modules["hada_t1"]._keys:
            return None
        return "gradients of the Tucker form are those of its value; PEFT's are not"


class Linear(LoHaWay):
    """Linear layers."""

    layers = (f"{_LAYER}.Linear",)
    operator = "hadamard_weight"
    copied = (*LoHaWay.copied, f"{_LAYER}.Linear._get_delta_activations")

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        if opaque_weight(layer.get_base_layer()) is not None:
            return "a weight that is not dense"
        return super().adapters(layer, x)

    def run(self, layer: Any, x: Tensor, adapters: list[Any]) -> Tensor:
        """See `Way.run`."""
        base = layer._modules["base_layer"]
        # The base layer comes before the draws, as it may draw too.
        result = None if plain_tensors(base, x) is not None else base(x)
        drawn = self._drawn(layer, adapters)
        if result is None:
            return loha.linear(base, x, drawn) if drawn else base(x)
        for one in drawn:
            result = loha.add(result, x.to(result.dtype), one)
        return result.to(x.dtype)


class Conv2d(LoHaWay):
    """Convolutions over images."""

    layers = (f"{_LAYER}.Conv2d",)
    operator = "hadamard_weight"
    copied = (*LoHaWay.copied, f"{_LAYER}.Conv2d._get_delta_activations")

    def run(self, layer: Any, x: Tensor, adapters: list[Any]) -> Tensor:
        """See `Way.run`."""
        base = layer._modules["base_layer"]
        drawn = self._drawn(layer, adapters)
        return (loha.conv2d(base, x, drawn) if drawn else base(x)).to(x.dtype)
