"""What PEFT's LoHa and LoKr share: their draws of dropout, and how their layers run."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...methods._base_layer import CONVOLUTIONS, Few, opaque_weight, plain_tensors
from ...ops.shortcut import Shortcut
from .tuner_layer import TunerWay


class Draw(NamedTuple):
    """What PEFT's dropout of one adapter does in one pass.

    Attributes:
        on: Whether the adapter acts at all.
        kept: (out,), which rows of the update stay; None for all of them.
    """

    on: bool
    kept: Tensor | None = None


def draws(layer: Any, names: list[str], rows: int) -> list[Draw]:
    """Draw as PEFT draws, in its order: one number for every adapter in training, then the rows of its update."""
    found = []
    for name in names:
        if not layer.training:
            found.append(Draw(True))
            continue
        # A compiler has a random stream of its own, and cannot branch on a tensor.
        module_p = layer.module_dropout[name]
        if module_p == 0:
            # Drawn all the same, and 0 itself drops too.
            on = torch.compiler.is_compiling() or torch.rand(1).item() > 0
        else:
            on = bool(torch.rand(1) > module_p)
        if not on:
            found.append(Draw(False))
            continue
        p = layer.rank_dropout[name]
        found.append(Draw(True, torch.rand(rows) > p if p else None))
    return found


def unfit_base(layer: Any, x: Tensor | None) -> str | None:
    """Say why the base layer of a LoHa or LoKr layer is left to PEFT, or return None."""
    base = layer._modules["base_layer"]
    # Below another adapter's layer a linear layer is called, and then added to.
    if isinstance(layer.get_base_layer(), nn.Linear):
        return None if x is None or x.shape[-1:] == (layer.in_features,) else "an input of another size"
    if type(base) not in CONVOLUTIONS:
        return f"the base layer is a {type(base).__name__}"
    if base.padding_mode != "zeros":
        return "PEFT ignores the padding mode of the convolution"
    dims = len(base.kernel_size)
    if x is not None and (x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != base.in_channels):
        return "an input of another shape"
    return None


class LycorisWay(TunerWay):
    """Layers with LoHa or LoKr."""

    arithmetic: ClassVar[ModuleType]
    """The module of `peftk.methods`."""

    def masked(self, layer: Any, name: str, one: Any, kept: Tensor) -> Any:
        """Return an adapter of which some rows alone stay, (out,), on the CPU."""
        raise NotImplementedError

    def drawn(self, layer: Any, adapters: list[Any]) -> list[Any]:
        """Return the adapters that act in this pass, given with their names."""
        found = []
        drawn = draws(layer, [name for name, _ in adapters], layer.weight.shape[0])
        for (name, one), (on, kept) in zip(adapters, drawn, strict=True):
            if on:
                found.append(one if kept is None else self.masked(layer, name, one, kept))
        return found


class OnLinear(LycorisWay):
    """Those on linear layers."""

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        if opaque_weight(layer.get_base_layer()) is not None:
            return "a weight that is not dense"
        return super().adapters(layer, x)

    def few(self, layer: Any, adapters: list[Any], weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        """See `Way.few`."""
        found: Few | None = self.arithmetic.few(weight, bias, adapters[0][1])
        return found

    def run(self, layer: Any, x: Tensor, adapters: list[Any]) -> Tensor:
        """See `Way.run`."""
        base = layer._modules["base_layer"]
        # The base layer comes before the draws, as it may draw too.
        result = None if plain_tensors(base, x) is not None else base(x)
        drawn = self.drawn(layer, adapters)
        if result is None:
            found: Tensor = self.arithmetic.linear(base, x, drawn) if drawn else base(x)
            return found
        for one in drawn:
            result = self.arithmetic.add(result, x.to(result.dtype), one)
        return result.to(x.dtype)


class OnConvolution(LycorisWay):
    """Those on convolutions."""

    def run(self, layer: Any, x: Tensor, adapters: list[Any]) -> Tensor:
        """See `Way.run`."""
        base = layer._modules["base_layer"]
        drawn = self.drawn(layer, adapters)
        result: Tensor = self.arithmetic.conv(base, x, drawn) if drawn else base(x)
        return result.to(x.dtype)
