"""PEFT's OFT: linear layers, quantised ones among them, and convolutions."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ... import functional as F
from ...methods import oft
from ...methods._base_layer import Few, observed, plain_tensors
from ...ops.shortcut import Shortcut
from .tuner_layer import NONE_ACTIVE, SHARED, TunerWay, active, dense_weight, parameter, plain_example, unfit

_MODULE = "peft.tuners.oft.layer.OFTRotationModule"


class Rotated(TunerWay):
    """Layers whose input, or whose filters, are rotated block by block."""

    method = "oft"
    copied: ClassVar[tuple[str, ...]] = (
        *SHARED,
        f"{_MODULE}.forward",
        f"{_MODULE}._cayley_batch",
        f"{_MODULE}._pytorch_skew_symmetric",
    )

    def _found(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        from peft.tuners.oft.layer import OFTRotationModule

        modules = layer._modules["oft_R"]._modules
        found: list[Any] = []
        parameters: list[Any] = []
        for name in active(layer, modules):
            module = modules[name]
            if observed(OFTRotationModule, module):
                return "a hook or another forward is on a module of the adapter"
            if module.coft:
                return "COFT writes to its parameters in the forward pass"
            weight = parameter(module)
            parameters.append(weight)
            found.append((weight, module.block_size, self._terms(module)))
        if not found:
            return NONE_ACTIVE
        return unfit(layer, x, parameters) or found

    @staticmethod
    def _terms(module: Any) -> int | None:
        return max(module.num_cayley_neumann_terms, 1) if module.use_cayley_neumann else None


class Linear(Rotated):
    """Linear layers and GPT-2's Conv1D."""

    layers = (
        "peft.tuners.oft.layer.Linear",
        "peft.tuners.oft.bnb.Linear8bitLt",
        "peft.tuners.oft.bnb.Linear4bit",
    )
    operator = "block_rotate_linear"

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        if x is not None and (x.dim() == 4 or x.shape[-1:] != (layer.in_features,)):
            # Four dimensions are an image to PEFT's module.
            return "an input of another shape"
        return self._found(layer, x)

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        plain = plain_example(layer)
        if plain is None:
            return None
        packed, size, _ = adapters[0]
        return *plain, packed.new_empty(packed.shape[0], size, size)

    def few(self, layer: Any, adapters: list[Any], weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        """See `Way.few`."""
        run, rows = oft.few(weight, bias, *adapters[0])
        # Four dimensions are an image to PEFT's module.
        return Few(lambda x: run(x) if x.dim() != 4 else None, rows)

    def run(self, layer: Any, x: Tensor, adapters: list[Any]) -> Tensor:
        """See `Way.run`."""
        base, dtype = layer._modules["base_layer"], x.dtype
        blocks = [oft.rotations(*one) for one in adapters]
        if len(blocks) == 1 and plain_tensors(base, x) is not None:
            return oft.linear(base, x, blocks)
        for one in blocks:
            x = F.block_rotate(x, one)
        result: Tensor = base(x.to(dtype))
        return result.to(dtype)


class Conv2d(Rotated):
    """Convolutions over images."""

    layers = ("peft.tuners.oft.layer.Conv2d",)
    operator = "block_rotate"
    copied = (*Rotated.copied, f"{_MODULE}._unfold", f"{_MODULE}._fold")

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        base = layer._modules["base_layer"]
        if type(base) is not nn.Conv2d or base.groups != 1:
            return "the base layer is no convolution without groups"
        if base.kernel_size != (1, 1) and not self.correct:
            return (
                "PEFT adds up overlapping patches where the kernel is larger than 1 x 1; correct=True rotates filters"
            )
        if x is not None and (x.dim() != 4 or x.shape[1] != base.in_channels):
            return "an input of another shape"
        return self._found(layer, x)

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        weight, (packed, size, _) = dense_weight(layer), adapters[0]
        return None if weight is None else (weight.flatten(1), packed.new_empty(packed.shape[0], size, size))

    def run(self, layer: Any, x: Tensor, adapters: list[Any]) -> Tensor:
        """See `Way.run`."""
        blocks = [oft.rotations(*one) for one in adapters]
        # PEFT's first adapter rotates the input first, and here the filters are rotated.
        return oft.conv2d(layer._modules["base_layer"], x, blocks).to(x.dtype)

    def note(self, layer: Any) -> str | None:
        """See `Way.note`."""
        if layer._modules["base_layer"].kernel_size == (1, 1):
            return None
        return "correct=True: the filters are rotated, where PEFT adds up overlapping patches"
