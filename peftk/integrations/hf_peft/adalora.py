"""PEFT's AdaLoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...methods._base_layer import Few
from ...methods.lora import LowRank
from ...ops._few_rows import FEW, low_rank_few
from ...ops.shortcut import Shortcut
from . import lora as lora_layers
from .lora import FEW_ROWS_NOTE, Active, dropout_of, run_conv, run_linear, scale_of, unfit_rows
from .tuner_layer import NONE_ACTIVE, SHARED, TunerWay, active, held, unfit


class Triplets(TunerWay):
    """Layers whose update is a singular value decomposition."""

    method = "adalora"
    copied = SHARED

    def _found(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        modules = layer._modules
        firsts, seconds, values, ranks = (held(modules[n]) for n in ("lora_A", "lora_B", "lora_E", "ranknum"))
        found: list[Any] = []
        parameters: list[Any] = []
        for name in active(layer, firsts):
            p, scale = dropout_of(modules["lora_dropout"]._modules[name]), scale_of(layer, name)
            if p is None or scale is None:
                return "a hook or another forward is on a module of the adapter, or a scale that is no number"
            a, b, e = firsts[name], seconds[name], values[name]
            if a.shape[0] == 0:
                continue
            parameters += (a, b, e)
            rank, gate = ranks[name], e.view(-1)
            # A tensor of another class may be spread over processes, and this one without an element.
            known = type(rank) in (Tensor, nn.Parameter) and rank.is_cpu and rank.numel() == 1
            trained = rank.requires_grad and torch.is_grad_enabled()
            if known and not trained and type(scale) is float and not torch.compiler.is_compiling():
                found.append(Active(LowRank(a, b, scale / (rank.item() + 1e-5), gate), p))
            else:
                # Nobody waits for a value that is on a device, no graph has one, and somebody may train it.
                gate = gate * (scale / (rank + 1e-5)).to(e.device, e.dtype)
                found.append(Active(LowRank(a, b, 1.0, gate), p))
        if not found:
            return NONE_ACTIVE
        return unfit(layer, x, parameters) or found


class Linear(Triplets):
    """Linear layers and GPT-2's Conv1D."""

    layers = ("peft.tuners.adalora.layer.SVDLinear",)
    operator = "low_rank_linear"

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        why = None if x is None else unfit_rows(layer, x, small=True)
        return why or self._found(layer, x)

    def note(self, layer: Any) -> str | None:
        """See `Way.note`."""
        return FEW_ROWS_NOTE

    def few(
        self, layer: Any, adapters: list[Active], weight: Tensor, bias: Tensor | None, rests: Shortcut
    ) -> Few | None:
        """See `Way.few`."""
        (one, p), names = adapters[0], active(layer, layer._modules["lora_A"]._parameters)
        # Others may be active that have lost their rank.
        if p > 0 or type(one.scale) is not float or len(names) != 1:
            return None
        e, rank = (layer._modules[container]._parameters.get(names[0]) for container in ("lora_E", "ranknum"))
        scale = scale_of(layer, names[0])
        if e is None or rank is None:
            return None

        def run(x: Tensor) -> Tensor | None:
            # Both may have been written to. A view would stay behind where another value is put into the parameter.
            if not rank.is_cpu or rank.numel() != 1:
                return None
            return low_rank_few(x, weight, bias, one.a, one.b, scale / (rank.item() + 1e-5), e)

        return Few(run, FEW)

    example = lora_layers.Linear.example

    def run(self, layer: Any, x: Tensor, adapters: list[Active]) -> Tensor:
        """See `Way.run`."""
        return run_linear(layer._modules["base_layer"], x, adapters)


class Conv2d(Triplets):
    """Convolutions over images."""

    layers = ("peft.tuners.adalora.layer.SVDConv2d",)
    operator = "conv2d"

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        base = layer._modules["base_layer"]
        if type(base) is not nn.Conv2d or base.padding_mode != "zeros" or base.groups != 1:
            return "the base layer is no convolution without groups that pads with zeros"
        if x is not None and (x.dim() not in (3, 4) or x.shape[-3] != base.in_channels):
            return "an input of another shape"
        found = self._found(layer, x)
        if isinstance(found, str):
            return found
        shape = base.in_channels, *base.kernel_size
        return [
            Active(LowRank((one.a * one.gate[:, None]).view(-1, *shape), one.b[:, :, None, None], one.scale), p)
            for one, p in found
        ]

    def run(self, layer: Any, x: Tensor, adapters: list[Active]) -> Tensor:
        """See `Way.run`."""
        return run_conv(layer._modules["base_layer"], x, adapters)
