"""LyCORIS's LoKr: linear layers and convolutions, in Tucker form, with DoRA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...methods import lokr, magnitudes
from ...methods.lokr import Kronecker
from .network_module import SHARED, Call, NetworkModuleWay, base_output, drawn_rows, example_weight, strength

_MODULE = "lycoris.modules.lokr.LokrModule"
_FUNCTIONS = "lycoris.functional.lokr"


class LoKr(NetworkModuleWay):
    """Modules whose update is a Kronecker product."""

    method = "lokr"
    layers = (_MODULE,)
    operator = "kronecker_linear"
    copied = (
        *SHARED,
        f"{_MODULE}.get_weight",
        f"{_MODULE}.apply_weight_decompose",
        f"{_MODULE}._rebuild_forward",
        f"{_MODULE}.bypass_forward",
        f"{_MODULE}.bypass_forward_diff",
        f"{_FUNCTIONS}.kron_weight",
        f"{_FUNCTIONS}._kron_weight",
        f"{_FUNCTIONS}.make_kron",
        f"{_FUNCTIONS}.kron_bypass",
        f"{_FUNCTIONS}._kron_bypass",
        "lycoris.functional.general.rebuild_tucker",
    )
    parameter_names = (
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        *("dora_scale", "scalar"),
    )

    def unfit(self, layer: Any, x: Tensor | None) -> str | None:
        """See `NetworkModuleWay.unfit`."""
        if layer.bypass_mode and layer.module_type != "linear":
            return "bypass_mode on a convolution"
        return super().unfit(layer, x)

    def adapter(self, layer: Any) -> Kronecker:
        """See `NetworkModuleWay.adapter`."""
        first = (layer.lokr_w1,) if layer.use_w1 else (layer.lokr_w1_a, layer.lokr_w1_b)
        second = (layer.lokr_w2,) if layer.use_w2 else (layer.lokr_w2_a, layer.lokr_w2_b)
        if layer.tucker and not layer.use_w2:
            second = (*second, layer.lokr_t2)
        elif layer.module_type == "conv1d" and layer.use_w2:
            # Three dimensions are PEFT's order of numbers to `lokr`.
            second = (layer.lokr_w2.unsqueeze(-1),)
        w1 = first[0] * layer.scalar.to(first[0].dtype), *first[1:]
        return Kronecker(w1, second, float(layer.scale) * strength(layer))

    def drops_rows(self, layer: Any) -> bool:
        """See `NetworkModuleWay.drops_rows`."""
        return not layer.bypass_mode and not layer.wd

    def adapted(self, layer: Any, x: Tensor, call: Call) -> Tensor:
        """See `NetworkModuleWay.adapted`."""
        base, adapter, decomposed = call
        rows = drawn_rows(layer)
        if rows is not None:
            adapter = adapter._replace(kept=rows[0].to(x.device), scale=adapter.scale / rows[1])
        linear = layer.module_type == "linear"
        if decomposed is not None:
            cut = len(adapter.w1)

            def write(weight: Tensor, *t: Tensor) -> Tensor:
                return lokr.merged(weight, Kronecker(t[:cut], t[cut:], adapter.scale))

            tensors = *adapter.w1, *adapter.w2
            if linear:
                return magnitudes.written_linear(x, base.weight, base.bias, write, tensors, decomposed)
            return magnitudes.written_conv(base, x, write, tensors, decomposed)
        if linear:
            if base is None:
                y = base_output(layer, x)
                return lokr.add(y, x.to(y.dtype), adapter)
            return lokr.linear(base, x, [adapter])
        return lokr.conv(base, x, [adapter])

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        plain, adapter = example_weight(layer), adapters[0].adapter
        if plain is None:
            return None
        return *plain, lokr.first(adapter).detach(), lokr.second(adapter).detach(), 1.0
