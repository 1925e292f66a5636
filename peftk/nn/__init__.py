"""Adapted layers and their configurations, usable on their own or through `peftk.get_peft_model`."""

from __future__ import annotations

from torch import nn

from ..methods._base_layer import kind_of
from .adalora import AdaLoraConfig, AdaLoRAConv, AdaLoRALinear
from .adaption_prompt import AdaptedAttention, AdaptionPromptConfig
from .base.adapter_layer import AdapterLayer
from .base.config import PeftConfig, PeftType, TaskType
from .base.kinds import KINDS, why_unsupported
from .boft import BOFTConfig, BOFTConv2d, BOFTLinear
from .c3a import C3AConfig, C3AConv2d, C3ALinear
from .loha import LoHaConfig, LoHaConv, LoHaLinear
from .lokr import LoKrConfig, LoKrConv, LoKrLinear
from .lora import LoraConfig, LoRAConv, LoRAEmbedding, LoRALinear, LoraRuntimeConfig
from .oft import OFTConfig, OFTConv2d, OFTLinear
from .oft_embedding import OFTEmbedding
from .output_oft import OutputOFTConfig, OutputOFTConv, OutputOFTLinear
from .xlora import XLoraConfig

LAYERS: tuple[type[AdapterLayer], ...] = (
    LoRALinear,
    AdaLoRALinear,
    AdaLoRAConv,
    OFTLinear,
    OFTConv2d,
    OFTEmbedding,
    OutputOFTLinear,
    OutputOFTConv,
    BOFTLinear,
    BOFTConv2d,
    C3ALinear,
    C3AConv2d,
    LoKrLinear,
    LoKrConv,
    LoHaLinear,
    LoHaConv,
    LoRAConv,
    LoRAEmbedding,
    AdaptedAttention,
)
"""Every adapted layer. A configuration and a kind of layer belong to at most one of them."""


def check_known(config: PeftConfig) -> None:
    """Raise TypeError unless `config` belongs to a method of this package."""
    known = {layer.config_class for layer in LAYERS}
    if type(config) not in known:
        raise TypeError(
            f"peft_config: expected one of {sorted(c.__name__ for c in known)}, got {type(config).__name__} "
            f"from {type(config).__module__}"
        )


def layer_class_for(config: PeftConfig, module: nn.Module, name: str = "") -> type[AdapterLayer]:
    """Return the class that adapts `module` as `config` says.

    Raises:
        TypeError: There is none; the message names the module, its class and what is supported.
    """
    layers = [layer for layer in LAYERS if layer.config_class is type(config)]
    kinds = [kind for kind in KINDS if any(kind in layer.base_kinds for layer in layers)]
    # A method that adapts whole modules instead of these kinds has one class, which says what it wraps.
    reason = why_unsupported(module, kinds) if kinds else layers[0].refusal(module)
    if reason is not None:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(f"target_modules: module {name!r} is a {kind}, which cannot be adapted: {reason}")
    return next(layer for layer in layers if not kinds or kind_of(module) in layer.base_kinds)


__all__ = [
    "AdaLoRAConv",
    "AdaLoRALinear",
    "AdaLoraConfig",
    "AdaptedAttention",
    "AdapterLayer",
    "AdaptionPromptConfig",
    "BOFTConfig",
    "BOFTConv2d",
    "BOFTLinear",
    "C3AConfig",
    "C3AConv2d",
    "C3ALinear",
    "LoHaConfig",
    "LoHaConv",
    "LoHaLinear",
    "LoKrConfig",
    "LoKrConv",
    "LoKrLinear",
    "LoRAConv",
    "LoRAEmbedding",
    "LoRALinear",
    "LoraConfig",
    "LoraRuntimeConfig",
    "OFTConfig",
    "OFTConv2d",
    "OFTEmbedding",
    "OFTLinear",
    "OutputOFTConfig",
    "OutputOFTConv",
    "OutputOFTLinear",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "XLoraConfig",
]
