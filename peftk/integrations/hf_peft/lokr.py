"""PEFT's LoKr: linear layers and convolutions."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor

from ...methods import lokr
from ...methods.lokr import Kronecker
from .lora import scale_of
from .lycoris_layer import LycorisWay, OnConvolution, OnLinear, unfit_base
from .tuner_layer import NONE_ACTIVE, SHARED, active, dense_weight, held, plain_example, unfit

_LAYER = "peft.tuners.lokr.layer"


class LoKrWay(LycorisWay):
    """Layers whose update is a Kronecker product."""

    method = "lokr"
    arithmetic: ClassVar[ModuleType] = lokr
    copied: ClassVar[tuple[str, ...]] = (
        *SHARED,
        f"{_LAYER}.LoKrLayer.get_delta_weight",
        f"{_LAYER}.LoKrLayer._available_adapters.fget",
        f"{_LAYER}.make_kron",
        f"{_LAYER}.make_weight_cp",
    )

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        modules = layer._modules
        w1, w1_a, w1_b, w2, w2_a, w2_b, t2 = (
            held(modules[name])
            for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        )
        found: list[Any] = []
        parameters: list[Any] = []
        for name in active(layer, {**w1, **w1_a}):
            scale = scale_of(layer, name)
            if type(scale) is not float:
                return "a scale that is no number"
            first = (w1[name],) if name in w1 else (w1_a[name], w1_b[name])
            second = (w2[name],) if name in w2 else (w2_a[name], w2_b[name])
            if name not in w2 and name in t2:
                second = (*second, t2[name])
            found.append((name, Kronecker(first, second, scale)))
            parameters += (*first, *second)
        if not found:
            return NONE_ACTIVE
        return unfit_base(layer, x) or unfit(layer, x, parameters) or found

    def masked(self, layer: Any, name: str, one: Kronecker, kept: Tensor) -> Kronecker:
        """See `LycorisWay.masked`."""
        scale = one.scale
        if layer.rank_dropout_scale[name]:
            scale = scale / kept.float().mean()
        return one._replace(kept=kept.to(one.w1[0].device), scale=scale)


def _factors_without_values(adapter: Kronecker) -> tuple[Tensor, Tensor]:
    """Return tensors of the shapes of w1 and w2 as matrices."""
    w1, w2 = adapter.w1, adapter.w2
    if len(w2) == 3:
        rows, columns = w2[0].shape[1], w2[1].shape[1] * w2[2][0, 0].numel()
    else:
        rows, columns = w2[0].shape[0], w2[-1][0].numel()
    return w1[0].new_empty(w1[0].shape[0], w1[-1].shape[1]), w1[0].new_empty(rows, columns)


class Linear(OnLinear, LoKrWay):
    """Linear layers."""

    layers = (f"{_LAYER}.Linear",)
    operator = "kronecker_linear"
    copied = (*LoKrWay.copied, f"{_LAYER}.Linear._get_delta_activations")

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        plain = plain_example(layer)
        if plain is None:
            return None
        return *plain, *_factors_without_values(adapters[0][1]), 1.0


class Conv2d(OnConvolution, LoKrWay):
    """Convolutions over images."""

    layers: ClassVar[tuple[str, ...]] = (f"{_LAYER}.Conv2d",)
    operator = "kronecker_weight"
    copied: ClassVar[tuple[str, ...]] = (*LoKrWay.copied, f"{_LAYER}.Conv2d._get_delta_activations")

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        weight, one = dense_weight(layer), adapters[0][1]
        return None if weight is None else (weight.flatten(1), *_factors_without_values(one), 1.0)


class Conv1d(Conv2d):
    """Convolutions over sequences."""

    layers = (f"{_LAYER}.Conv1d",)
    copied = (*LoKrWay.copied, f"{_LAYER}.Conv1d._get_delta_activations")
