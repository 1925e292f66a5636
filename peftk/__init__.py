"""peftk: fused kernels for parameter-efficient fine-tuning."""

from . import functional, nn
from ._version import __version__
from .integrations.accelerate import accelerate
from .models.peft_model import PeftModel, get_peft_model
from .models.status import get_layer_status, get_model_status
from .nn import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    C3AConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftType,
    TaskType,
    XLoraConfig,
)
from .runtime.registry import explain
from .runtime.settings import use_backend

__all__ = [
    "AdaLoraConfig",
    "AdaptionPromptConfig",
    "BOFTConfig",
    "C3AConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "OFTConfig",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "TaskType",
    "XLoraConfig",
    "__version__",
    "accelerate",
    "explain",
    "functional",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "nn",
    "use_backend",
]
