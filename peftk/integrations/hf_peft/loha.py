"""PEFT's LoHa: linear layers and convolutions."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor

from ...methods import loha
from ...methods.loha import Hadamard
from .lora import scale_of
from .lycoris_layer import LycorisWay, OnConvolution, OnLinear, unfit_base
from .tuner_layer import NONE_ACTIVE, SHARED, active, dense_weight, held, unfit

_LAYER = "peft.tuners.loha.layer"
_CONTAINERS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


class LoHaWay(LycorisWay):
    """Layers whose update is the product of two low-rank ones, entry by entry."""

    method = "loha"
    arithmetic: ClassVar[ModuleType] = loha
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

    def masked(self, layer: Any, name: str, one: Hadamard, kept: Tensor) -> Hadamard:
        """See `LycorisWay.masked`."""
        rows = kept.to(one.w1_a.dtype)
        return one._replace(rows=(rows / rows.mean()).to(one.w1_a.device))

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


class Linear(OnLinear, LoHaWay):
    """Linear layers."""

    layers = (f"{_LAYER}.Linear",)
    operator = "hadamard_weight"
    copied = (*LoHaWay.copied, f"{_LAYER}.Linear._get_delta_activations")


class Conv2d(OnConvolution, LoHaWay):
    """Convolutions over images."""

    layers: ClassVar[tuple[str, ...]] = (f"{_LAYER}.Conv2d",)
    operator = "hadamard_weight"
    copied: ClassVar[tuple[str, ...]] = (*LoHaWay.copied, f"{_LAYER}.Conv2d._get_delta_activations")


class Conv1d(Conv2d):
    """Convolutions over sequences."""

    layers = (f"{_LAYER}.Conv1d",)
    copied = (*LoHaWay.copied, f"{_LAYER}.Conv1d._get_delta_activations")
