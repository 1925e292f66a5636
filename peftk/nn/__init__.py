"""Adapted layers and their configurations, usable on their own or through `peftk.get_peft_model`."""

from __future__ import annotations

from ._base import AdapterLayer
from .config import PeftConfig, PeftType, TaskType
from .lora import LoraConfig, LoRALinear
from .oft import OFTConfig, OFTLinear

LAYER_OF_CONFIG: dict[type[PeftConfig], type[AdapterLayer]] = {
    layer.config_class: layer for layer in (LoRALinear, OFTLinear)
}

__all__ = ["AdapterLayer", "LoRALinear", "LoraConfig", "OFTConfig", "OFTLinear", "PeftConfig", "PeftType", "TaskType"]
