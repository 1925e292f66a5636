"""LyCORIS's LoRA and LoCon: linear layers and convolutions, with Tucker's core, with DoRA."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...methods import lora, lora_conv, magnitudes
from ...methods._base_layer import plain_tensors
from ...methods.lora import LowRank
from ...ops.conv import convolve_with
from .network_module import SHARED, Call, NetworkModuleWay, base_output, drawn_rows, example_weight, strength

_MODULE = "lycoris.modules.locon.LoConModule"


class LoCon(NetworkModuleWay):
    """Modules whose update is of low rank."""

    method = "locon"
    layers = (_MODULE,)
    operator = "low_rank_linear"
    copied = (
        *SHARED,
        f"{_MODULE}.make_weight",
        f"{_MODULE}.apply_weight_decompose",
        f"{_MODULE}.bypass_forward",
        f"{_MODULE}.bypass_forward_diff",
        "lycoris.functional.locon.diff_weight",
        "lycoris.functional.locon._diff_weight",
        "lycoris.functional.locon.bypass_forward_diff",
        "lycoris.functional.locon._bypass_diff",
        "lycoris.functional.general.rebuild_tucker",
    )
    parameter_names = ("dora_scale", "scalar")

    def factors(self, layer: Any) -> list[Tensor]:
        """See `NetworkModuleWay.factors`."""
        cores = [layer.lora_mid.weight] if layer.tucker else []
        return [layer.lora_down.weight, layer.lora_up.weight, *cores, *super().factors(layer)]

    def unfit(self, layer: Any, x: Tensor | None) -> str | None:
        """See `NetworkModuleWay.unfit`."""
        why = super().unfit(layer, x)
        if why is None and layer.isconv and layer.bypass_mode and set(layer.org_module[0].dilation) != {1}:
            return "bypass_mode ignores the dilation of the convolution"
        return why

    def adds_to_output(self, layer: Any) -> bool:
        """See `NetworkModuleWay.adds_to_output`."""
        return not layer.isconv or layer.org_module[0].groups == 1

    def adapter(self, layer: Any) -> LowRank:
        """See `NetworkModuleWay.adapter`."""
        a, b = layer.lora_down.weight, layer.lora_up.weight
        if layer.tucker:
            a = torch.einsum("ij...,jr->ir...", layer.lora_mid.weight, a.flatten(1))
        return LowRank(a, b * layer.scalar.to(b.dtype), float(layer.scale) * strength(layer))

    def drops_rows(self, layer: Any) -> bool:
        """See `NetworkModuleWay.drops_rows`."""
        return not layer.bypass_mode

    def adapted(self, layer: Any, x: Tensor, call: Call) -> Tensor:
        """See `NetworkModuleWay.adapted`."""
        base, adapter, decomposed = call
        rows = drawn_rows(layer, x.device)
        if rows is not None:
            factor = (rows[0].to(adapter.b.dtype) / rows[1]).view(-1, *[1] * (adapter.b.dim() - 1))
            adapter = adapter._replace(b=adapter.b * factor)
        a, b, scale = adapter[:3]
        if decomposed is not None:
            write = functools.partial(_written, scale)
            if layer.isconv and decomposed.of_outputs and base.groups == 1:
                return magnitudes.low_rank_conv(base, x, a, b, scale, decomposed)
            if layer.isconv:
                return magnitudes.written_conv(base, x, write, (a, b), decomposed)
            if decomposed.of_outputs:
                return magnitudes.low_rank_linear(x, base.weight, base.bias, a, b, scale, decomposed)
            return magnitudes.written_linear(x, base.weight, base.bias, write, (a, b), decomposed)
        if not layer.isconv:
            return lora.add(base_output(layer, x), x, adapter) if base is None else lora.linear(base, x, [adapter])
        if base is None:
            return lora_conv.add(layer.org_module[0], base_output(layer, x), x, adapter)
        if base.groups == 1:
            return lora_conv.conv(base, x, [adapter])
        # LyCORIS's second factor sees the ranks of all groups.
        plain = plain_tensors(base, x)
        return convolve_with(functools.partial(_written, scale), base, x, a, b, plain=plain)

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        plain, adapter = example_weight(layer), adapters[0].adapter
        return None if plain is None else (*plain, adapter.a.detach(), adapter.b.detach(), 1.0)


def _written(scale: float, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    rows, b, a = (t.flatten(1).to(weight.dtype) for t in (weight, b, a))
    return torch.addmm(rows, b, a, alpha=scale).view(weight.shape)
