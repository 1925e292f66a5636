"""LoRA on convolutions: A is a convolution of the base layer's geometry, B a 1x1 convolution."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from ... import functional as F
from ...ops._autograd import apply
from ..base.adapter_layer import Adapter
from ..base.conv import convolve, convolve_frozen
from ..base.dropout import Dropout
from .config import LoraConfig
from .dora import Magnitude
from .layer import LoRALayer
from .linear import initialise_factors


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _Expand(torch.autograd.Function):
    """``base + scale * B h`` pixel by pixel; `base` is overwritten where `in_place`."""

    @staticmethod
    def forward(base: Tensor, h: Tensor, b: Tensor, scale: float, in_place: bool) -> Tensor:
        if _channels_last(base):
            rows, hidden = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (base, h))
            add = rows.addmm_ if in_place else rows.addmm
            out = add(hidden, b.mT, alpha=scale).view(len(base), *base.shape[2:], -1).permute(0, 3, 1, 2)
        else:
            in_place = in_place and base.is_contiguous()
            planes = base.flatten(2)
            add = planes.baddbmm_ if in_place else planes.baddbmm
            out = add(b.expand(len(base), -1, -1), h.flatten(2), alpha=scale).view(base.shape)
        return base if in_place else out

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        base, h, b, ctx.scale, _ = inputs
        if output is base:
            ctx.mark_dirty(base)
        ctx.save_for_backward(h, b)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        h, b = ctx.saved_tensors
        need_base, need_h, need_b = ctx.needs_input_grad[:3]
        planes = grad.flatten(2)
        dh = (b.mT @ planes * ctx.scale).view(h.shape) if need_h else None
        db = (planes @ h.flatten(2).mT).sum(0) * ctx.scale if need_b else None
        return grad if need_base else None, dh, db, None, None


class LoRAConv2d(LoRALayer):
    """An nn.Conv2d with LoRA adapters: ``y = conv(x, W) + bias + s * B conv(dropout(x), A)``.

    A has the base layer's kernel size, stride, padding, padding mode and dilation, and sees all channels whatever the
    groups of the base layer; B is a 1x1 convolution with those groups. With `use_dora`:
    ``y = g * (conv(x, W) + s * B conv(dropout(x), A)) + bias``, ``g = m / ||W + s B A||``, channel by channel.

    Parameters per adapter: `lora_A.<name>.weight` (r, in, height, width), `lora_B.<name>.weight`
    (out, r / groups, 1, 1), with `lora_bias` `lora_B.<name>.bias` (out,), and with `use_dora`
    `lora_magnitude_vector.<name>.weight` (1, out, 1, 1).

    Args:
        base_layer: The nn.Conv2d to adapt; it is frozen.
        config: A LoraConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not a dense nn.Conv2d.
        ValueError: Its groups do not divide the rank; it has groups and `use_dora` is set; or the initialisation is
            one for linear layers.

    Source: Hu et al., arXiv 2106.09685; Liu et al., arXiv 2402.09353.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.LoRAConv2d(torch.nn.Conv2d(4, 8, 3, dilation=2), peftk.LoraConfig(r=2))
        >>> layer(torch.randn(1, 4, 7, 7)).shape
        torch.Size([1, 8, 3, 3])
    """

    base_kinds = ("Conv2d",)

    @classmethod
    def _create(cls, base_layer: nn.Module, config: LoraConfig, module_name: str, initialise: bool) -> Adapter:
        where = f"module {module_name!r} is a convolution"
        settings = cls._settings(config, module_name)
        groups, r = base_layer.groups, settings["r"]
        if r % groups:
            raise ValueError(f"r: {where} with groups={groups}, which must divide the rank; got r={r}")
        if groups > 1 and config.use_dora:
            raise ValueError(f"use_dora: {where} with groups={groups}; DoRA needs groups=1")
        if config.init_lora_weights == "orthogonal":
            raise ValueError(f"init_lora_weights: {where}, for which 'orthogonal' has no meaning")
        cls._warn_about_bias(base_layer, config, module_name)
        geometry = {
            name: getattr(base_layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        a = nn.Conv2d(base_layer.in_channels, r, **geometry, bias=False)
        b = nn.Conv2d(r, base_layer.out_channels, 1, groups=groups, bias=config.lora_bias)
        if initialise:
            initialise_factors(a, b, config.init_lora_weights)
        parts = {"lora_A": a, "lora_B": b}
        if config.use_dora:
            parts["lora_magnitude_vector"] = Magnitude(1, base_layer.out_channels, 1, 1)
        return Adapter(parts, settings)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        # What the base layer has just made and nobody has seen may be written to.
        fresh = self._can_fuse(x, args, kwargs) and not torch.compiler.is_compiling()
        result = self.base_layer(x, *args, **kwargs)
        x = x.to(result.dtype)
        for name in names:
            p = self.lora_dropout[name] if self.training else 0.0
            a, b = (t.to(x.dtype) for t in self._pair(name))
            seen = Dropout(x, p)
            if self.use_dora[name]:
                g = self._gain(name)
                result = self._rescaled(result, seen, g, p)
                b = b * g.view(-1, 1, 1, 1).to(b.dtype)
                fresh = False
            hidden = seen.product(functools.partial(convolve, self.lora_A[name]), a)
            result = self._expanded(result, hidden, b, self.scaling[name], fresh)
            bias = self._extra_bias(name)
            if bias is not None:
                result = result + bias.to(result.dtype).view(-1, 1, 1)
        return result

    def _rescaled(self, result: Tensor, seen: Dropout, g: Tensor, p: float) -> Tensor:
        if p > 0:
            x = seen.dropped()
            second = convolve_frozen(self.base_layer, x, self.base_layer.weight.to(x.dtype))
            return torch.addcmul(result, second, (g - 1).to(result.dtype).view(-1, 1, 1))
        if _channels_last(result):
            return F.scale_channels(result.permute(0, 2, 3, 1), g, self.bias).permute(0, 3, 1, 2)
        return F.scale_channels(result, g, self.bias, dim=-3)

    def _expanded(self, result: Tensor, h: Tensor, b: Tensor, scale: float | Tensor, fresh: bool = False) -> Tensor:
        """Add ``scale * B h`` to a result, onto it where it is `fresh`."""
        if self.base_layer.groups > 1 or result.dim() == 3 or isinstance(scale, Tensor):
            return result + tf.conv2d(h, b, groups=self.base_layer.groups) * scale
        transformed = torch._C._are_functorch_transforms_active()
        return apply(_Expand, result, h, b.flatten(1), float(scale), fresh and not transformed)

    def _mixed(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        x = x.to(result.dtype)
        groups = self._mixed_groups(names)
        if self.base_layer.groups > 1:
            groups = [[name] for group in groups for name in group]
        for group in groups:
            a = torch.cat([self.lora_A[name].weight for name in group]).to(x.dtype)
            b = torch.cat([self.lora_B[name].weight for name in group], dim=1).to(x.dtype)
            gate = self._table(group, names, {name: self.r[name] for name in group}, x)
            hidden = convolve(self.lora_A[group[0]], x, a) * gate.view(*gate.shape, 1, 1)
            result = self._expanded(result, hidden, b, 1.0)
            biases = {name: self._extra_bias(name) for name in group}
            if any(bias is not None for bias in biases.values()):
                rows = {n: x.new_zeros(self.out_features) if bias is None else bias for n, bias in biases.items()}
                result = result + self._table(group, names, rows, result).view(len(x), -1, 1, 1)
        return result

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if the base layer has groups, through which A sees all channels, or lacks a bias."""
        names = self._to_merge(adapter_names)
        if names and self.base_layer.groups > 1:
            raise ValueError(
                f"merge: adapter {names[0]!r} connects all channels of a convolution with groups="
                f"{self.base_layer.groups}, so that no weight of the layer is the merged one"
            )
        super().check_merge(adapter_names)


__all__ = ["LoRAConv2d"]
