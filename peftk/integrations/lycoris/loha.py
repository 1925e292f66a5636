"""LyCORIS's LoHa: linear layers and convolutions, in Tucker form, with DoRA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...methods import loha, magnitudes
from ...methods.loha import Hadamard
from .network_module import SHARED, Call, NetworkModuleWay, base_output, drawn_rows, example_weight, strength

_MODULE = "lycoris.modules.loha.LohaModule"


class LoHa(NetworkModuleWay):
    """Modules whose update is the product of two low-rank ones, entry by entry."""

    method = "loha"
    layers = (_MODULE,)
    operator = "hadamard_weight"
    copied = (
        *SHARED,
        f"{_MODULE}.get_weight",
        f"{_MODULE}.apply_weight_decompose",
        f"{_MODULE}.bypass_forward",
        f"{_MODULE}.bypass_forward_diff",
        "lycoris.functional.loha.diff_weight",
        "lycoris.functional.loha.bypass_forward_diff",
        "lycoris.functional.loha.HadaWeight.forward",
        "lycoris.functional.loha.HadaWeightTucker.forward",
    )
    parameter_names = (
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("dora_scale", "scalar"),
    )

    def adapter(self, layer: Any) -> Hadamard:
        """See `NetworkModuleWay.adapter`."""
        w1_a = layer.hada_w1_a * layer.scalar.to(layer.hada_w1_a.dtype)
        cores = (layer.hada_t1, layer.hada_t2) if layer.tucker else (None, None)
        four = w1_a, layer.hada_w1_b, layer.hada_w2_a, layer.hada_w2_b
        return Hadamard(*four, float(layer.scale) * strength(layer), *cores)

    def drops_rows(self, layer: Any) -> bool:
        """See `NetworkModuleWay.drops_rows`."""
        return not layer.bypass_mode and not layer.wd

    def adapted(self, layer: Any, x: Tensor, call: Call) -> Tensor:
        """See `NetworkModuleWay.adapted`."""
        base, adapter, decomposed = call
        rows = drawn_rows(layer)
        if rows is not None:
            kept = rows[0].to(adapter.w1_a.dtype) / rows[1]
            adapter = adapter._replace(rows=kept.to(adapter.w1_a.device))
        linear = layer.module_type == "linear"
        if decomposed is not None:
            tensors = tuple(t for t in (*adapter[:4], adapter.t1, adapter.t2) if t is not None)

            def write(weight: Tensor, *t: Tensor) -> Tensor:
                return loha.merged(weight, Hadamard(t[0], t[1], t[2], t[3], adapter.scale, *t[4:]))

            if linear:
                return magnitudes.written_linear(x, base.weight, base.bias, write, tensors, decomposed)
            return magnitudes.written_conv(base, x, write, tensors, decomposed)
        if linear:
            if base is None:
                y = base_output(layer, x)
                return loha.add(y, x.to(y.dtype), adapter)
            return loha.linear(base, x, [adapter])
        return loha.conv(base, x, [adapter])

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        plain, adapter = example_weight(layer), adapters[0].adapter
        if plain is None or adapter.t1 is not None:
            return None
        return plain[1], *(factor.detach() for factor in adapter[:4]), 1.0
