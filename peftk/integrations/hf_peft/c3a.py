"""PEFT's C3A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.shared.wide import HALF
from ...methods import c3a
from ...methods._base_layer import Few, plain_tensors
from ...ops.shortcut import Shortcut
from .tuner_layer import NONE_ACTIVE, SHARED, TunerWay, active, held, plain_example, unfit


class Linear(TunerWay):
    """Linear layers."""

    method = "c3a"
    layers = ("peft.tuners.c3a.layer.C3ALinear",)
    operator = "circulant_linear"
    copied = (*SHARED, "peft.tuners.c3a.utils.BlockCircularConvolution.forward")

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        kernels = held(layer._modules["c3a_kernel"])
        names = active(layer, kernels)
        if not names:
            return NONE_ACTIVE
        if len(names) > 1 and not self.correct:
            return "PEFT feeds the second adapter with the first one's output; correct=True gives both the same input"
        found = [kernels[name] for name in names]
        if x is not None:
            if x.shape[-1:] != (layer.in_features,):
                return "an input of another size"
            if x.dtype is not torch.float32 and x.dtype not in HALF:
                return f"PEFT computes in float32, and the input is {x.dtype}"
            if x.device != found[0].device:
                return "the adapter is on another device than its input"
        return unfit(layer, None, found) or found

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        plain = plain_example(layer)
        if plain is None:
            return None
        return *plain, adapters[0], 1.0

    def few(self, layer: Any, adapters: list[Any], weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        """See `Way.few`."""
        return c3a.few(weight, bias, adapters[0])

    def run(self, layer: Any, x: Tensor, adapters: list[Any]) -> Tensor:
        """See `Way.run`."""
        base = layer._modules["base_layer"]
        if plain_tensors(base, x) is not None:
            return c3a.linear(base, x, adapters)
        result = base(x)
        for kernel in adapters:
            result = c3a.add(result, x, kernel)
        return result.to(x.dtype)

    def note(self, layer: Any) -> str | None:
        """See `Way.note`."""
        if len(active(layer, layer._modules["c3a_kernel"]._keys)) > 1:
            return "correct=True: all adapters see the input, where PEFT feeds the second with the first one's output"
        return "the gradient of the input is that of the value; PEFT's is not"
