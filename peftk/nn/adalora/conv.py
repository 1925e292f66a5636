"""AdaLoRA on convolutions: the triplets of their flattened filters."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ...methods import adalora, lora_conv
from ...methods.lora import LowRank
from ..base.merging import Merged
from .linear import AdaLoRALinear


class AdaLoRAConv(AdaLoRALinear):
    """A convolution with AdaLoRA adapters on its flattened filters: ``W' = W + c * ((B E) A)``.

    Parameters per adapter: as `AdaLoRALinear` has them, with in_channels * taps of the kernel as inputs. It runs as a
    convolution by ``E A`` of the layer's geometry and one of a single tap by B, without the dense update.

    Args:
        base_layer: The nn.Conv1d, nn.Conv2d or nn.Conv3d to adapt, without groups; it is frozen.
        config: An AdaLoraConfig; a `rank_pattern` in it makes the layer as small as a saved file is.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not a dense convolution of these kinds.
        ValueError: It has groups.

    Source: Zhang et al., arXiv 2303.10512.

    Example:
        >>> import torch, peftk
        >>> config = peftk.AdaLoraConfig(init_r=4, target_r=2, total_step=9)
        >>> layer = peftk.nn.AdaLoRAConv(torch.nn.Conv2d(4, 8, 3), config)
        >>> layer(torch.randn(1, 4, 5, 5)).shape
        torch.Size([1, 8, 3, 3])
    """

    peft_class_prefix = "SVD"
    base_kinds: ClassVar[tuple[str, ...]] = ("Conv1d", "Conv2d", "Conv3d")

    @classmethod
    def _sizes(cls, base_layer: Any, module_name: str) -> tuple[int, int]:
        if base_layer.groups != 1:
            raise ValueError(
                f"target_modules: module {module_name!r} is a convolution with groups={base_layer.groups}; AdaLoRA "
                "connects all input channels with all outputs, so expected groups=1"
            )
        return base_layer.weight[0].numel(), base_layer.out_channels

    def low_rank(self, name: str) -> LowRank:
        """Return the tensors and settings of one adapter, as the arithmetic of convolutions takes them."""
        flat = super().low_rank(name)
        assert flat.gate is not None
        kernel, single = self.base_layer.kernel_size, [1] * len(self.base_layer.kernel_size)
        a = (flat.a * flat.gate[:, None]).view(-1, self.base_layer.in_channels, *kernel)
        return flat._replace(a=a, b=flat.b.view(*flat.b.shape, *single), gate=None)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update of one adapter, like the weight, in the adapter's dtype."""
        return adalora.update(super().low_rank(adapter)).view(self.base_layer.weight.shape)

    def _merge_into(self, tensors: Merged, name: str) -> None:
        weight = tensors["weight"]
        filters, _ = adalora.merged(weight.flatten(1), None, super().low_rank(name))
        tensors["weight"] = filters.view(weight.shape)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        # All triplets of a layer may have been pruned before the adapter was saved.
        adapters = [self.low_rank(name) for name in names if self.r[name]]
        return lora_conv.conv(self.base_layer, x, adapters, args, kwargs)


__all__ = ["AdaLoRAConv"]
