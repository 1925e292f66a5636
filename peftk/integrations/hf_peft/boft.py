"""PEFT's BOFT: linear layers and convolutions."""

from __future__ import annotations

import functools
from typing import Any

from packaging.version import Version
from torch import Tensor, nn

from ...methods import boft
from ...methods._base_layer import Few, kind_of, observed, plain_tensors
from ...methods.boft import Butterfly
from ...ops.shortcut import Shortcut
from .tuner_layer import FINGERPRINTS, NONE_ACTIVE, SHARED, TunerWay, active, dense_weight, held, plain_example, unfit

_LAYER = "peft.tuners.boft.layer"


class Butterflies(TunerWay):
    """Layers whose input, or whose filters, a butterfly of blocks rotates."""

    method = "boft"
    copied = (*SHARED, f"{_LAYER}.BOFTLayer.cayley_batch")

    def _found(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        modules = layer._modules
        squares, scales = held(modules["boft_R"]), held(modules["boft_s"])
        found: list[Any] = []
        parameters: list[Any] = []
        for name in active(layer, squares):
            dropout = modules["boft_dropout"]._modules[name]
            if type(dropout) is nn.Identity:
                if observed(nn.Identity, dropout):
                    return "a hook or another forward is on a module of the adapter"
            elif dropout.training or observed(type(dropout), dropout):
                return "PEFT's multiplicative dropout in training"
            parameters += (squares[name], scales[name])
            found.append((squares[name], scales[name]))
        if not found:
            return NONE_ACTIVE
        return unfit(layer, x, parameters) or found

    @staticmethod
    def _butterflies(adapters: list[Any]) -> list[Butterfly]:
        return [Butterfly(boft.rotations(square), scale) for square, scale in adapters]


@functools.cache
def _calls_base() -> bool:
    """Whether this version of PEFT calls the base layer: before, it read weight and bias."""
    return Version(FINGERPRINTS.version) >= Version("0.20.0")


class Linear(Butterflies):
    """Linear layers."""

    layers = (f"{_LAYER}.Linear",)
    operator = "block_rotate_linear"

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        base = layer._modules["base_layer"]
        if kind_of(base) not in ("Linear", "Conv1D"):
            return f"the base layer is a {type(base).__name__}"
        if not _calls_base() and observed(nn.Linear, base):
            return "the base layer is no plain nn.Linear, and this version of PEFT does not call it"
        if x is not None:
            if x.shape[-1:] != (layer.in_features,):
                return "an input of another size"
            if not _calls_base() and plain_tensors(base, x) is None:
                return "the base layer is trained or cast, and this version of PEFT reads its weight apart"
        return self._found(layer, x)

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        plain = plain_example(layer)
        if plain is None:
            return None
        square, _ = adapters[0]
        size = square.shape[-1] << (len(square) - 1)
        return *plain, square.new_empty(plain[0].shape[-1] // size, size, size)

    def few(self, layer: Any, adapters: list[Any], weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        """See `Way.few`."""
        return boft.few(weight, bias, *adapters[0])

    def run(self, layer: Any, x: Tensor, adapters: list[Any]) -> Tensor:
        """See `Way.run`."""
        return boft.linear(layer._modules["base_layer"], x, self._butterflies(adapters)).to(x.dtype)


class Conv2d(Butterflies):
    """Convolutions over images."""

    layers = (f"{_LAYER}.Conv2d",)
    operator = "block_rotate"

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        base = layer._modules["base_layer"]
        plain = type(base) is nn.Conv2d and base.groups == 1 and base.dilation == (1, 1)
        if not plain or base.padding_mode != "zeros" or not all(map(_square, (base.kernel_size, base.stride))):
            return "PEFT ignores groups, dilation, padding mode, and sizes that are not square"
        if not isinstance(base.padding, tuple) or not _square(base.padding):
            return "PEFT ignores paddings that are not square"
        if x is not None:
            if x.dim() not in (3, 4) or x.shape[-3] != base.in_channels:
                return "an input of another shape"
            if plain_tensors(base, x) is None:
                return "the base layer is hooked, trained or cast, and PEFT does not call it"
        return self._found(layer, x)

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        weight, (square, _) = dense_weight(layer), adapters[0]
        if weight is None:
            return None
        size = square.shape[-1] << (len(square) - 1)
        return weight.flatten(1), square.new_empty(weight[0].numel() // size, size, size)

    def run(self, layer: Any, x: Tensor, adapters: list[Any]) -> Tensor:
        """See `Way.run`."""
        # PEFT's last adapter is the outermost one.
        return boft.conv2d(layer._modules["base_layer"], x, self._butterflies(adapters)).to(x.dtype)


def _square(pair: tuple[int, ...]) -> bool:
    return len(set(pair)) == 1
