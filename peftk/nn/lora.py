"""LoRA: a low-rank update beside a frozen layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._base import Adapter
from ._kinds import features_of, settle_fan_in_fan_out
from ._low_rank import LowRankLinear
from .config import pattern_key
from .lora_config import LoraConfig, LoraRuntimeConfig


class LoRALinear(LowRankLinear):
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
        features = features_of(base_layer)
        a = linear(features[0], r, bias=False)
        b = linear(r, features[1], bias=config.lora_bias)
        if initialise:
            _initialise(a, b, config.init_lora_weights)
        scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        settings = {"r": r, "lora_alpha": alpha, "scaling": scaling, "lora_dropout": float(config.lora_dropout)}
        return Adapter({"lora_A": a, "lora_B": b}, settings)

    def _factors(self, name: str) -> tuple[Tensor, Tensor, float | Tensor, None]:
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], None

    def _extra_bias(self, name: str) -> Tensor | None:
        bias = self.lora_B[name].bias
        return None if bias is None else bias * self.scaling[name]

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if an adapter has a bias and the base layer has none to merge it into."""
        for name in self._to_merge(adapter_names):
            if self.lora_B[name].bias is not None and self.base_layer.bias is None:
                raise ValueError(
                    f"merge: adapter {name!r} has a bias (lora_bias=True) but the base layer has none to merge it into"
                )


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
