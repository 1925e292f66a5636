"""LoRA: a low-rank update beside a frozen linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from ... import functional as F
from ..base.adapter_layer import Adapter
from ..base.dropout import Dropout
from ..base.kinds import call, features_of, opaque_weight, settle_fan_in_fan_out
from .config import LoraConfig, LoraRuntimeConfig
from .dora import Magnitude
from .layer import LoRALayer
from .low_rank import LowRankLinear


class LoRALinear(LoRALayer, LowRankLinear):
    """An nn.Linear, or GPT-2's Conv1D, with LoRA adapters: ``y = x W^T + bias + s * (dropout(x) A^T) B^T``.

    With `use_dora`: ``y = g * (x W^T + s * (dropout(x) A^T) B^T) + bias``, ``g = m / ||W + s B A||``, row by row; the
    gradient takes the norm for a constant.

    Parameters per adapter: `lora_A.<name>.weight` (r, in), `lora_B.<name>.weight` (out, r), with `lora_bias`
    `lora_B.<name>.bias` (out,), and with `use_dora` `lora_magnitude_vector.<name>.weight` (out,).

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

    @classmethod
    def _create(cls, base_layer: nn.Module, config: LoraConfig, module_name: str, initialise: bool) -> Adapter:
        settle_fan_in_fan_out(config, base_layer)
        if config.use_dora and opaque_weight(base_layer) is not None:
            raise NotImplementedError(
                f"use_dora: the weight of module {module_name!r}, a {type(base_layer).__name__}, is "
                f"{opaque_weight(base_layer)}; DoRA reads the weight in every pass and needs it dense and "
                "floating-point; leave the module out, or use LoRA"
            )
        cls._warn_about_bias(base_layer, config, module_name)
        settings = cls._settings(config, module_name)
        linear = nn.Linear if initialise else _uninitialised_linear
        features, outputs = features_of(base_layer)
        a = linear(features, settings["r"], bias=False)
        b = linear(settings["r"], outputs, bias=config.lora_bias)
        if initialise:
            initialise_factors(a, b, config.init_lora_weights)
        parts = {"lora_A": a, "lora_B": b}
        if config.use_dora:
            parts["lora_magnitude_vector"] = Magnitude(outputs)
        return Adapter(parts, settings)

    @staticmethod
    def _rows_of(weight: Tensor, base_layer: nn.Module) -> Tensor:
        return weight if isinstance(base_layer, nn.Linear) else weight.mT

    def _factors(self, name: str) -> tuple[Tensor, Tensor, float | Tensor, None]:
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], None

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if not any(self.use_dora[name] for name in names):
            return LowRankLinear._adapted(self, x, names, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        x = x.to(result.dtype)
        for name in names:
            result = self._decomposed(result, x, name) if self.use_dora[name] else self._add(result, x, name)
        return result

    def _decomposed(self, result: Tensor, x: Tensor, name: str) -> Tensor:
        """Apply a DoRA adapter to a result."""
        g = self._gain(name)
        a, b, scale, _ = self._factors(name)
        p = self.lora_dropout[name] if self.training else 0.0
        if p == 0:
            return F.dora_compose(result, x, a, b, g, self.bias, scale)
        # The base product that g scales is that of the dropped input too, as in PEFT.
        seen = Dropout(x, p)
        second = tf.linear(seen.dropped(), self._base_weight().to(x.dtype))
        result = torch.addcmul(result, second, (g - 1).to(result.dtype))
        hidden = seen.product(tf.linear, a.to(x.dtype))
        b = (b * (g.unsqueeze(1) * scale)).to(x.dtype)
        rows, hidden = (t.reshape(-1, t.shape[-1]) for t in (result, hidden))
        return torch.addmm(rows, hidden, b.mT).view(result.shape)

    def _mixed(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        result = call(self.base_layer, x, *args, **kwargs)
        x = x.to(result.dtype)
        middle = [1] * (x.dim() - 2)
        for group in self._mixed_groups(names):
            a = torch.cat([self.lora_A[name].weight for name in group])
            b = torch.cat([self.lora_B[name].weight for name in group], dim=1)
            gate = self._table(group, names, {name: self.r[name] for name in group}, b)
            gate = gate.view(len(gate), *middle, -1).expand(*x.shape[:-1], -1)
            result = F.low_rank_add(result, x, a, b, gate=gate)
            biases = {name: self._extra_bias(name) for name in group}
            if any(bias is not None for bias in biases.values()):
                rows = {n: b.new_zeros(self.out_features) if bias is None else bias for n, bias in biases.items()}
                result = result + self._table(group, names, rows, result).view(len(x), *middle, -1)
        return result


def _uninitialised_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, device="meta")


@torch.no_grad()
def initialise_factors(a: nn.Module, b: nn.Module, how: bool | str) -> None:
    """Initialise the factors, two linear layers or two convolutions, as `init_lora_weights` says."""
    if how is False:
        return
    r = a.weight.shape[0]
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
