"""LoRA on convolutions: A is a convolution of the base layer's geometry, B one of a single tap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...methods import lora_conv
from ...methods._base_layer import kind_of
from ...methods.lora import LowRank
from ...ops.conv import Convolution
from ..base.adapter_layer import Adapter
from .config import LoraConfig
from .layer import LoRALayer
from .linear import initialise_factors
from .magnitude import Magnitude
from .start import starts_inside


class LoRAConv(LoRALayer):
    """A convolution with LoRA adapters: ``y = conv(x, W) + bias + s * B conv(dropout(x), A)``.

    A has the base layer's kernel size, stride, padding, padding mode and dilation, and sees all channels whatever the
    groups of the base layer; B has a single tap and those groups. With `use_dora`:
    ``y = g * (conv(x, W) + s * B conv(dropout(x), A)) + bias``, ``g = m / ||W + s B A||``, channel by channel.

    Parameters per adapter: `lora_A.<name>.weight` (r, in, *kernel), `lora_B.<name>.weight`
    (out, r / groups, 1 ...), with `lora_bias` `lora_B.<name>.bias` (out,), and with `use_dora`
    `lora_magnitude_vector.<name>.weight` (1, out, 1 ...), or with `dora_inputs` (1, in), which scale the input.

    Args:
        base_layer: The nn.Conv1d, nn.Conv2d or nn.Conv3d to adapt; it is frozen.
        config: A LoraConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not a dense convolution of these kinds.
        ValueError: Its groups do not divide the rank; it has groups and `use_dora` is set; or the initialisation is
            one for linear layers.

    Source: Hu et al., arXiv 2106.09685; Liu et al., arXiv 2402.09353.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.LoRAConv(torch.nn.Conv2d(4, 8, 3, dilation=2), peftk.LoraConfig(r=2))
        >>> layer(torch.randn(1, 4, 7, 7)).shape
        torch.Size([1, 8, 3, 3])
    """

    base_kinds = ("Conv1d", "Conv2d", "Conv3d")

    @classmethod
    def _create(cls, base_layer: Convolution, config: LoraConfig, module_name: str, initialise: bool) -> Adapter:
        where = f"module {module_name!r} is a convolution"
        settings = cls._settings(config, module_name)
        groups, r = base_layer.groups, settings["r"]
        if r % groups:
            raise ValueError(f"r: {where} with groups={groups}, which must divide the rank; got r={r}")
        if groups > 1 and config.use_dora:
            raise ValueError(f"use_dora: {where} with groups={groups}; DoRA needs groups=1")
        if config.init_lora_weights == "orthogonal" or starts_inside(config.init_lora_weights):
            raise ValueError(f"init_lora_weights: {where}, for which {config.init_lora_weights!r} has no meaning")
        cls._warn_about_bias(base_layer, config, module_name)
        geometry: dict[str, Any] = {
            name: getattr(base_layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        make = getattr(nn, str(kind_of(base_layer)))
        a = make(base_layer.in_channels, r, **geometry, bias=False)
        b = make(r, base_layer.out_channels, 1, groups=groups, bias=config.lora_bias)
        if initialise:
            initialise_factors(a, b, config.init_lora_weights)
        parts: dict[str, nn.Module | nn.Parameter] = {"lora_A": a, "lora_B": b}
        if config.use_dora:
            parts["lora_magnitude_vector"] = Magnitude(*cls._number_of_magnitudes(base_layer, config))
        return Adapter(parts, settings)

    @classmethod
    def _number_of_magnitudes(cls, base_layer: Convolution, config: Any) -> tuple[int, ...]:
        shape = super()._number_of_magnitudes(base_layer, config)
        return shape if config.dora_inputs else (1, *shape, *[1] * len(base_layer.kernel_size))

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self._listened_to(names):
            return self._called(x, names, args, kwargs)
        return lora_conv.conv(self.base_layer, x, [self.low_rank(name) for name in names], args, kwargs)

    def _with_mixed(
        self, x: Tensor, adapters: list[LowRank], choice: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        if any(adapter.dropout_p for adapter in adapters):
            raise ValueError(
                f"adapter_names: an adapter of convolution {self.module_name!r} has lora_dropout, which a batch that "
                "mixes adapters has on linear layers only; set it to 0, or call eval()"
            )
        return lora_conv.conv_mixed(self.base_layer, x, adapters, choice, args, kwargs)

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if the base layer has groups, through which A sees all channels, or lacks a bias."""
        names = self._to_merge(adapter_names)
        if names and self.base_layer.groups > 1:
            raise ValueError(
                f"merge: adapter {names[0]!r} connects all channels of a convolution with groups="
                f"{self.base_layer.groups}, so that no weight of the layer is the merged one"
            )
        super().check_merge(adapter_names)


__all__ = ["LoRAConv"]
