"""LoRA: a low-rank update beside a frozen linear layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...methods import lora
from ...methods._base_layer import Few, features_of, listened_to, observed, opaque_weight, stored
from ...methods._quantised import readable
from ...methods.lora import LowRank
from ...ops.kept import Kept
from ...ops.shortcut import Shortcut
from ..base.adapter_layer import Adapter
from ..base.config import PeftConfig
from ..base.kinds import settle_fan_in_fan_out
from ..base.offloading import onloaded
from .config import LoraConfig, LoraRuntimeConfig
from .layer import LoRALayer
from .magnitude import Magnitude
from .start import is_random, start_of, starts_inside


class LoRALinear(LoRALayer):
    """An nn.Linear, or GPT-2's Conv1D, with LoRA adapters: ``y = x W^T + bias + s * (dropout(x) A^T) B^T``.

    With `use_dora`: ``y = g * (x W^T + s * (dropout(x) A^T) B^T) + bias``, ``g = m / ||W + s B A||``, row by row; the
    gradient takes the norm for a constant. With `dora_inputs` too: ``y = (g * x) (W + s B A)^T + bias``, column by
    column.

    Parameters per adapter: `lora_A.<name>.weight` (r, in), `lora_B.<name>.weight` (out, r), with `lora_bias`
    `lora_B.<name>.bias` (out,), and with `use_dora` `lora_magnitude_vector.<name>.weight` (out,), of inputs (1, in).

    With `init_lora_weights` "pissa" or "olora" the factors start as a part ``s * B0 A0`` of the weight, and the layer
    is ``y = x (W - s B0 A0)^T + bias + s * (dropout(x) A^T) B^T``: `lora_start.<name>` holds `a` and `b`, which are
    never trained, and the weight stays what it is.

    Args:
        base_layer: The layer to adapt; it is frozen.
        config: A LoraConfig; `rank_pattern` and `alpha_pattern` are matched against `module_name`.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is neither, or holds integers that its call cannot multiply by.

    Source: Hu et al., arXiv 2106.09685; Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.LoRALinear(torch.nn.Linear(8, 8), peftk.LoraConfig(r=4))
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    base_kinds = ("Linear", "Conv1D")
    adapter_layer_names = (*LoRALayer.adapter_layer_names, "lora_start")
    constant_names = frozenset({"lora_start"})

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
        """See `LoRALayer.make`; what the factors start as is found again where they are about to be read."""
        options = {"autocast_adapter_dtype": autocast_adapter_dtype, "initialise": initialise}
        adapter = super().make(base_layer, config, module_name, **options)
        how = config.init_lora_weights
        if initialise or not starts_inside(how):
            return adapter
        if is_random(how):
            raise ValueError(
                f"init_lora_weights: {how!r} starts at random numbers that are in no file, so that what is left of the "
                "weight is not known; save such an adapter with path_initial_model_for_weight_conversion"
            )

        def rest() -> dict[str, nn.Module]:
            with onloaded([base_layer]):
                start = start_of(
                    base_layer, adapter.settings["r"], adapter.settings["scaling"], how, f"module {module_name!r}"
                )
                cls._place([start], base_layer, autocast_adapter_dtype)
            return {"lora_start": start}

        adapter.rest = rest
        return adapter

    @classmethod
    def _create(cls, base_layer: nn.Module, config: LoraConfig, module_name: str, initialise: bool) -> Adapter:
        settle_fan_in_fan_out(config, base_layer)
        if config.use_dora and not readable(base_layer):
            raise NotImplementedError(
                f"use_dora: the weight of module {module_name!r}, a {type(base_layer).__name__}, is "
                f"{opaque_weight(base_layer)}; DoRA reads the weight in every pass and needs it dense, or quantised by "
                "bitsandbytes or torchao; leave the module out, or use LoRA"
            )
        cls._warn_about_bias(base_layer, config, module_name)
        settings = cls._settings(config, module_name)
        linear = nn.Linear if initialise else _uninitialised_linear
        features, outputs = features_of(base_layer)
        a = linear(features, settings["r"], bias=False)
        b = linear(settings["r"], outputs, bias=config.lora_bias)
        parts: dict[str, nn.Module | nn.Parameter] = {"lora_A": a, "lora_B": b}
        if initialise and starts_inside(config.init_lora_weights):
            how = str(config.init_lora_weights)
            start = start_of(base_layer, settings["r"], settings["scaling"], how, f"module {module_name!r}")
            a.weight.data, b.weight.data = start.a.data.clone(), start.b.data.clone()
            parts["lora_start"] = start
        elif initialise:
            initialise_factors(a, b, config.init_lora_weights)
        if config.use_dora:
            parts["lora_magnitude_vector"] = Magnitude(*cls._number_of_magnitudes(base_layer, config))
        return Adapter(parts, settings)

    def low_rank(self, name: str) -> LowRank:
        """Return the tensors and settings of one adapter, as its arithmetic takes them, with what it subtracts."""
        start = self.__dict__["_modules"]["lora_start"]._modules.get(name)
        own = self._trained(name)
        if start is None:
            return own
        return own._replace(a=torch.cat([own.a, start.a]), b=torch.cat([own.b, -start.b], 1))

    def _subtracted(self, name: str) -> LowRank:
        start = self.lora_start[name]
        return LowRank(start.a, start.b, -self.scaling[name])

    def _each(self, names: list[str]) -> list[LowRank]:
        """Return what adapters add in this pass; dropout reaches what is trained, not what is subtracted."""
        found = []
        for name in names:
            if self.training and self.lora_dropout[name] and name in self.lora_start:
                found += [self._subtracted(name), self._trained(name)]
            else:
                found.append(self.low_rank(name))
        return found

    def _called(self, x: Tensor, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        result = super()._called(x, names, args, kwargs)
        for name in names:
            if name in self.lora_start:
                result = lora.add(result, x, self._subtracted(name))
        return result

    def _trained(self, name: str) -> LowRank:
        # Straight from the dictionaries: a look-up that goes through nn.Module runs Python of its own.
        own = self.__dict__
        modules = own["_modules"]
        first, second = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        p = own["lora_dropout"][name] if own["training"] else 0.0
        scale, bias = own["scaling"][name], second._parameters["bias"]
        bias = None if bias is None else bias * scale
        if not own["use_dora"][name]:
            return LowRank(stored(first), stored(second), scale, None, bias, p)
        magnitude, kept = stored(modules["lora_magnitude_vector"]._modules[name]), own["_kept"].get(name)
        if kept is None:
            kept = own["_kept"][name] = Kept()
        return LowRank(stored(first), stored(second), scale, None, bias, p, magnitude, kept, own["dora_inputs"][name])

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        name, alone = names[0], len(names) == 1
        own = self.__dict__
        modules = own["_modules"]
        if alone:
            factors = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
            if own["use_dora"][name]:
                # Its modules are never called, so that a hook on every module of the process has nothing to hear.
                heard = observed(nn.Linear, *factors) or observed(
                    Magnitude, modules["lora_magnitude_vector"]._modules[name]
                )
            else:
                heard = listened_to(nn.Linear, *factors)
        if (not alone or heard) and self._listened_to(names):
            return self._called(x, names, args, kwargs)
        plain = alone and not modules["lora_start"]._modules
        adapters = [self._trained(name)] if plain else self._each(names)
        base = modules["base_layer"]
        assert base is not None
        return lora.linear(base, x, adapters, args, kwargs)

    def _few(self, name: str, weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        factors = self._factor_modules(name)
        if name in self.lora_start._modules or listened_to(nn.Linear, *factors):
            return None
        if self.use_dora[name] and observed(Magnitude, self.lora_magnitude_vector[name]):
            return None
        return lora.few(self.base_layer, weight, bias, self._trained(name))

    def _with_mixed(
        self, x: Tensor, adapters: list[LowRank], choice: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        return lora.linear_mixed(self.base_layer, x, adapters, choice, args, kwargs)


class _Bare(nn.Linear):
    def reset_parameters(self) -> None:
        """Leave the values, where there will be others, or no memory to hold them."""


def _uninitialised_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    layer: nn.Linear = _Bare(in_features, out_features, bias=bias)
    layer.__class__ = nn.Linear
    return layer


Factor = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@torch.no_grad()
def initialise_factors(a: Factor, b: Factor, how: bool | str) -> None:
    """Initialise the factors, two linear layers or two convolutions, as `init_lora_weights` says."""
    if how is False:
        return
    r = a.weight.shape[0]
    if how == "orthogonal":
        q, _ = torch.linalg.qr(torch.randn(r, r))
        a.weight.copy_((torch.randn(a.weight.shape[1], r // 2) @ q[0::2]).T / 10)
        b.weight.copy_((torch.randn(r // 2, b.weight.shape[0]).T @ q[1::2]) / 10)
        return
    if how == "gaussian":
        nn.init.normal_(a.weight, std=1 / r)
    else:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    nn.init.zeros_(b.weight)
    if b.bias is not None:
        nn.init.zeros_(b.bias)


__all__ = ["LoRALinear", "LoraConfig", "LoraRuntimeConfig"]
