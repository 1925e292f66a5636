"""peftk: fused kernels for parameter-efficient fine-tuning."""

from . import functional, nn
from ._config import use_backend
from ._registry import explain
from ._version import __version__
from .model import PeftModel, get_peft_model
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
from .status import get_layer_status, get_model_status

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
    "explain",
    "functional",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "nn",
    "use_backend",
]
