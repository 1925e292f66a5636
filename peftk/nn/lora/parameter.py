"""LoRA on one parameter of any module, such as the stacked weights of experts: `target_parameters`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...methods import lora_parameter
from ...methods._base_layer import DENSE
from ...methods.lora_parameter import Stacked
from ..base.adapter_layer import Adapter
from ..base.config import PeftConfig
from ..base.merging import Merged
from .config import LoraConfig
from .layer import LoRALayer
from .linear import _uninitialised_linear
from .start import starts_inside


def holder_of(module: Any) -> Any:
    """Return the module whose parameters are adapted: what is inside of the layers around it."""
    while isinstance(module, LoRAParameter):
        module = module.base_layer
    return module


class LoRAParameter(LoRALayer):
    """A module of which one parameter, of two or three dimensions, has LoRA adapters.

    Several parameters of one module have a layer each, one around the other, as in PEFT. The experts of transformers
    are run on rows sorted by expert, the adapters beside their products; any other module is called with the updates
    in its parameters.

    A stack is (experts, out, in), or (experts, in, out) in a module whose `is_transposed` is true. A parameter of two
    dimensions is (out, in).

    Parameters per adapter: `lora_A.<name>.weight` (r * experts, in) and `lora_B.<name>.weight` (out, r * experts).

    Args:
        base_layer: The module; it is frozen.
        config: A LoraConfig; `rank_pattern` and `alpha_pattern` are matched against `module_name`.
        adapter_name: The name of the first adapter.
        module_name: The full name of the parameter in the model; its last part says which one of the module it is.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: The parameter is not floating-point.
        ValueError: It has another number of dimensions, or the configuration does not fit.

    Source: Hu et al., arXiv 2106.09685.

    Example:
        >>> import torch, peftk
        >>> from peftk.nn.lora.parameter import LoRAParameter
        >>> layer = LoRAParameter(torch.nn.Bilinear(3, 4, 5), peftk.LoraConfig(r=2), module_name="weight")
        >>> layer(torch.randn(2, 3), torch.randn(2, 4)).shape
        torch.Size([2, 5])
    """

    base_kinds = ()

    @classmethod
    def make(
        cls,
        base_layer: nn.Module,
        config: PeftConfig,
        module_name: str = "",
        *,
        autocast_adapter_dtype: bool = True,
        initialise: bool = True,
    ) -> Adapter:
        """Create the parameters of one adapter; see `AdapterLayer.make`."""
        if not isinstance(config, LoraConfig):
            raise TypeError(f"config: {cls.__name__} expects a LoraConfig, got {type(config).__name__}")
        holder, name = holder_of(base_layer), module_name.rpartition(".")[2]
        parameter = _checked(holder, name, config, module_name)
        if initialise and parameter.is_meta:
            raise ValueError(
                f"target_parameters: {module_name!r} is on the meta device, so the adapter has no place; load the "
                "weights of the base model before its adapters"
            )
        with contextlib.nullcontext() if initialise else torch.device("meta"):
            adapter = cls._create(holder, config, module_name, initialise)
        adapter.layer_class, adapter.device, adapter.target = cls, parameter.device, module_name
        cls._place(adapter.parts.values(), SimpleNamespace(weight=parameter), autocast_adapter_dtype)
        return adapter

    @classmethod
    def _create(cls, base_layer: nn.Module, config: LoraConfig, module_name: str, initialise: bool) -> Adapter:
        settings = cls._settings(config, module_name)
        experts, features, outputs = _sizes(base_layer, module_name.rpartition(".")[2])
        r = settings["r"]
        linear = nn.Linear if initialise else _uninitialised_linear
        a, b = linear(features, r * experts, bias=False), linear(r * experts, outputs, bias=False)
        if initialise and config.init_lora_weights:
            if config.init_lora_weights == "gaussian":
                nn.init.normal_(a.weight, std=1 / r)
            else:
                nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            nn.init.zeros_(b.weight)
        return Adapter({"lora_A": a, "lora_B": b}, settings)

    def _features(self) -> tuple[int, int]:
        self.weight_name = self.module_name.rpartition(".")[2]
        self.number, features, outputs = _sizes(self._holder, self.weight_name)
        return features, outputs

    @property
    def _holder(self) -> Any:
        return holder_of(self)

    @property
    def parameter_name(self) -> str:
        """The name of the parameter in its module, as PEFT calls it."""
        return self.weight_name

    def stacked(self, name: str) -> Stacked:
        """Return the factors of one adapter for each expert, and its settings."""
        p = self.lora_dropout[name] if self.training else 0.0
        a, b = lora_parameter.unstacked(*self._pair(name), self.number)
        return Stacked(a, b, self.scaling[name], p)

    def _chain(self) -> Iterator[LoRAParameter]:
        layer: Any = self
        while isinstance(layer, LoRAParameter):
            yield layer
            layer = layer.base_layer

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Any:
        holder, adapters = self._holder, {}
        for layer in self._chain():
            chosen = names if layer is self else layer.active_adapters
            if not (layer.disable_adapters or layer.merged_adapters):
                adapters[layer.weight_name] = [layer.stacked(name) for name in chosen if name in layer.r]
        if getattr(holder, "_is_expert_parallel", False):
            raise NotImplementedError(
                f"target_parameters: the experts of {self.module_name!r} are spread over devices (expert parallelism), "
                "and the adapters are not; run the model without it"
            )
        if lora_parameter.takes_rows(holder, (x, *args), kwargs):
            index, weights = args
            return lora_parameter.experts(holder, x, index, weights, adapters)
        if any(adapter.dropout_p for found in adapters.values() for adapter in found):
            raise NotImplementedError(
                f"lora_dropout: the update of {self.module_name!r} is in the parameter when this "
                f"{type(holder).__name__} is called, and the inputs it multiplies are not known; set it to 0"
            )
        return lora_parameter.in_parameters(holder, adapters, (x, *args), kwargs)

    def _mixed(self, x: Tensor, names: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        raise ValueError(
            f"adapter_names: the adapters of parameter {self.module_name!r} cannot be mixed in a batch; use "
            "set_adapter, or adapters without target_parameters"
        )

    # -- merging ----------------------------------------------------------------------------------------------

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if nothing can be merged into the parameter: it is offloaded, or computed from others."""
        if not self._to_merge(adapter_names):
            return
        if any(p.is_meta for p in (self.weight, *self.lora_A.parameters(), *self.lora_B.parameters())):
            raise ValueError(
                f"merge: {self.module_name!r} or its adapter is on the meta device, offloaded or not loaded yet; load "
                "the model without offloading to merge"
            )
        self._check_own(self.weight_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update of one adapter, in the shape of the parameter."""
        weight = torch.zeros_like(self.weight, dtype=self.lora_A[adapter].weight.dtype)
        return lora_parameter.added(weight, self.stacked(adapter), self._transposed)

    @property
    def _transposed(self) -> bool:
        return bool(getattr(self._holder, "is_transposed", False))

    def _merge_into(self, tensors: Merged, name: str) -> None:
        key = self.weight_name
        tensors[key] = lora_parameter.added(tensors[key], self.stacked(name), self._transposed)


def _sizes(module: Any, name: str) -> tuple[int, int, int]:
    """Return how many experts a parameter has, and their inputs and outputs, as PEFT reads them off its shape."""
    shape = getattr(module, name).shape
    if len(shape) == 2:
        return 1, shape[1], shape[0]
    experts, first, second = shape
    return (experts, first, second) if getattr(module, "is_transposed", False) else (experts, second, first)


def _checked(holder: Any, name: str, config: LoraConfig, module_name: str) -> nn.Parameter:
    """Return the parameter if it can have an adapter of this configuration."""
    parameter = getattr(holder, name)
    if type(parameter).__name__ == "DTensor":
        raise TypeError(
            f"target_parameters: {module_name!r} is a DTensor, sharded over devices, and its adapters would not be; "
            "adapt the model before it is sharded"
        )
    if parameter.dtype not in DENSE or parameter.numel() == 0:
        raise TypeError(
            f"target_parameters: {module_name!r} is a tensor of {parameter.dtype} of shape {tuple(parameter.shape)}; "
            "expected floating-point numbers"
        )
    if parameter.dim() not in (2, 3):
        raise ValueError(
            f"target_parameters: {module_name!r} has shape {tuple(parameter.shape)}; expected 2 or 3 dimensions"
        )
    for field in ("use_dora", "lora_bias", "fan_in_fan_out"):
        if getattr(config, field):
            raise ValueError(f"{field}: has no meaning for target_parameters, got True for {module_name!r}")
    if config.init_lora_weights == "orthogonal" or starts_inside(config.init_lora_weights):
        raise NotImplementedError(
            f"init_lora_weights={config.init_lora_weights!r}: not implemented for target_parameters, got it for "
            f"{module_name!r}; expected True, False or 'gaussian'"
        )
    if config.lora_dropout and not lora_parameter.is_interface(holder):
        raise ValueError(
            f"lora_dropout: {module_name!r} belongs to a {type(holder).__name__}, whose inputs are not known; only the "
            "experts of transformers take dropout in target_parameters; set it to 0"
        )
    return parameter


__all__ = ["LoRAParameter", "holder_of"]
