"""LoRA: a low-rank update beside a frozen layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ._base import Adapter, AdapterLayer
from ._kinds import settle_fan_in_fan_out
from .config import pattern_key
from .lora_config import LoraConfig, LoraRuntimeConfig


def low_rank_delta(a: Tensor, b: Tensor, scale: float | Tensor = 1.0, *, gate: Tensor | None = None) -> Tensor:
    """Return the dense update ``scale * (B * gate) A`` of shape (out, in), in the dtype of the factors."""
    return ((b if gate is None else b * gate) @ a) * scale


class LoRALinear(AdapterLayer):
    """An nn.Linear with LoRA adapters: ``y = x W^T + bias + s * (dropout(x) A^T) B^T``.

    Parameters per adapter: `lora_A.<name>.weight` (r, in), `lora_B.<name>.weight` (out, r) and, with `lora_bias`,
    `lora_B.<name>.bias` (out,).

    Args:
        base_layer: The nn.Linear to adapt; it is frozen.
        config: A LoraConfig; `rank_pattern` and `alpha_pattern` are matched against `module_name`.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not a dense nn.Linear.

    Source: Hu et al., arXiv 2106.09685.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.LoRALinear(torch.nn.Linear(8, 8), peftk.LoraConfig(r=4))
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")
    config_class = LoraConfig

    @classmethod
    def _create(cls, base_layer: nn.Module, config: LoraConfig, module_name: str, initialise: bool) -> Adapter:
        settle_fan_in_fan_out(config, base_layer)
        r = config.rank_pattern.get(pattern_key(config.rank_pattern, module_name), config.r)
        alpha = config.alpha_pattern.get(pattern_key(config.alpha_pattern, module_name), config.lora_alpha)
        if config.lora_bias and base_layer.bias is None:
            warnings.warn(
                f"lora_bias: module {module_name!r} has no bias, so this adapter can never be merged", stacklevel=2
            )
        linear = nn.Linear if initialise else _uninitialised_linear
        a = linear(base_layer.in_features, r, bias=False)
        b = linear(r, base_layer.out_features, bias=config.lora_bias)
        if initialise:
            _initialise(a, b, config.init_lora_weights)
        scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        settings = {"r": r, "lora_alpha": alpha, "scaling": scaling, "lora_dropout": float(config.lora_dropout)}
        return Adapter({"lora_A": a, "lora_B": b}, settings)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self._can_fuse(x, args, kwargs):
            frozen = self._modules["base_layer"]._parameters
            result = self._add(names[0], F.low_rank_linear, x, frozen["weight"], frozen["bias"])
            names = names[1:]
        else:
            result = self.base_layer(x, *args, **kwargs)
            if x.dtype != result.dtype:
                x = x.to(result.dtype)
        for name in names:
            result = self._add(name, F.low_rank_add, result, x)
        return result

    def _add(self, name: str, function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
        """Call one of the low-rank functions with the factors, the scale and the dropout of an adapter."""
        scale, p, b = self.scaling[name], self.lora_dropout[name], self.lora_B[name]
        dropout = {"dropout_p": p} if self.training and p > 0 else {}
        result = function(*args, self.lora_A[name].weight, b.weight, scale, **dropout)
        return result if b.bias is None else result + (b.bias * scale).to(result.dtype)

    def _factors(self, name: str) -> tuple[Tensor, Tensor, float | Tensor]:
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update of one adapter, (out, in), in the adapter's dtype."""
        return low_rank_delta(*self._factors(adapter))

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if an adapter has a bias and the base layer has none to merge it into."""
        for name in self._to_merge(adapter_names):
            if self.lora_B[name].bias is not None and self.base_layer.bias is None:
                raise ValueError(
                    f"merge: adapter {name!r} has a bias (lora_bias=True) but the base layer has none to merge it into"
                )

    def _merge_into(self, tensors: dict[str, Tensor], name: str) -> None:
        weight = tensors["weight"]
        a, b, scale = self._factors(name)
        tensors["weight"] = weight + low_rank_delta(a.to(weight.dtype), b.to(weight.dtype), scale)
        bias = self.lora_B[name].bias
        if bias is not None:
            tensors["bias"] = tensors["bias"] + bias.to(weight.dtype) * scale


def _uninitialised_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias)


@torch.no_grad()
def _initialise(a: nn.Linear, b: nn.Linear, how: bool | str) -> None:
    if how is False:
        return
    r = a.out_features
    if how == "orthogonal":
        q, _ = torch.linalg.qr(torch.randn(r, r))
        a.weight.copy_((torch.randn(a.in_features, r // 2) @ q[0::2]).T / 10)
        b.weight.copy_((torch.randn(r // 2, b.out_features).T @ q[1::2]) / 10)
        return
    if how == "gaussian":
        nn.init.normal_(a.weight, std=1 / r)
    else:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    nn.init.zeros_(b.weight)
    if b.bias is not None:
        nn.init.zeros_(b.bias)


__all__ = ["LoRALinear", "LoraConfig", "LoraRuntimeConfig"]
