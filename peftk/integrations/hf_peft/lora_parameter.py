"""PEFT's LoRA on parameters, where they belong to experts of transformers: beside the products of sorted rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...methods import lora_parameter
from ...methods.lora_parameter import Stacked
from ..way import Forward, plain
from .lora import scale_of
from .tuner_layer import NONE_ACTIVE, SHARED, TunerWay, active, parameter, unfit

_LAYER = "peft.tuners.lora.layer.ParamWrapper"


class Parameter(TunerWay):
    """Wrappers of parameters, one around the other where a module has several; the outermost is called."""

    method = "lora"
    layers = (_LAYER,)
    operator = "grouped_low_rank_linear"
    copied = (*SHARED, f"{_LAYER}.get_delta_weight", f"{_LAYER}._activate_lora", f"{_LAYER}.get_param")

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`; the module and, by the names of its parameters, the adapters of each."""
        found: dict[str, list[Stacked]] = {}
        parameters: list[Any] = []
        wrappers = [layer]
        while type(wrappers[-1]._modules["base_layer"]).__name__ == type(layer).__name__:
            wrappers.append(wrappers[-1]._modules["base_layer"])
        module = wrappers[-1]._modules["base_layer"]
        if not lora_parameter.is_interface(module):
            return f"a parameter of a {type(module).__name__}; only the experts of transformers run on sorted rows"
        if getattr(module, "_is_expert_parallel", False) or hasattr(module, "parametrizations"):
            return "experts that are spread over devices, or have other parametrizations"
        for wrapper in wrappers:
            if wrapper._disable_adapters or wrapper.merged_adapters:
                return "adapters of one of the parameters are merged or disabled"
            modules = wrapper._modules
            first, second = modules["lora_A"]._modules, modules["lora_B"]._modules
            for name in active(wrapper, first):
                scale = scale_of(wrapper, name)
                if type(scale) is not float:
                    return "a scale that is no number"
                a, b = parameter(first[name]), parameter(second[name])
                parameters += (a, b)
                factors = lora_parameter.unstacked(a, b, wrapper.num_experts)
                found.setdefault(wrapper.parameter_name, []).append(Stacked(*factors, scale))
        if not found:
            return NONE_ACTIVE
        return unfit(layer, x, parameters) or [(module, found)]

    def run(self, layer: Any, x: Tensor, adapters: list[Any], *args: Any) -> Tensor:
        """See `Way.run`; with the experts of each token and their weights."""
        module, found = adapters[0]
        index, weights = args
        return lora_parameter.experts(module, x, index, weights, found)

    def around(self, original: Forward, here: Callable[[Any], bool]) -> Forward:
        """See `Way.around`."""

        def forward(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            if here(layer) and plain(x) and len(args) == 2:
                found = self.adapters(layer, x)
                if type(found) is list and lora_parameter.takes_rows(found[0][0], (x, *args), kwargs):
                    return self.run(layer, x, found, *args)
            return original(layer, x, *args, **kwargs)

        return forward
