"""peftk: fused kernels for parameter-efficient fine-tuning."""

from typing import TYPE_CHECKING

from ._overview import asked_for
from ._version import __version__

# The command line says what it can do without waiting for torch, and nothing else is asked of it then.
if TYPE_CHECKING or not asked_for():
    from . import functional, nn
    from .integrations.accelerate import accelerate
    from .models.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from .models.base_state import get_base_model_state_dict, set_base_model_state_dict
    from .models.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
    from .models.inject import inject_adapter_in_model
    from .models.optimizers import create_loraplus_optimizer
    from .models.peft_model import PeftModel, get_peft_model
    from .models.preparation import prepare_model_for_kbit_training
    from .models.state_dict import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    from .models.status import get_layer_status, get_model_status
    from .models.strength import rescale_adapter_scale
    from .models.tasks import (
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from .models.tuners import (
        AdaLoraModel,
        AdaptionPromptModel,
        BOFTModel,
        C3AModel,
        LoHaModel,
        LoKrModel,
        LoraModel,
        OFTModel,
        OutputOFTModel,
    )
    from .models.xlora import XLoraModel
    from .nn import (
        AdaLoraConfig,
        AdaptionPromptConfig,
        BOFTConfig,
        C3AConfig,
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        LoraRuntimeConfig,
        OFTConfig,
        OutputOFTConfig,
        PeftConfig,
        PeftType,
        TaskType,
        XLoraConfig,
    )
    from .nn.base.foreign_config import get_peft_config
    from .runtime.registry import explain
    from .runtime.settings import use_backend

__all__ = [
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BOFTModel",
    "C3AConfig",
    "C3AModel",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoraConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "OFTConfig",
    "OFTModel",
    "OutputOFTConfig",
    "OutputOFTModel",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "XLoraConfig",
    "XLoraModel",
    "__version__",
    "accelerate",
    "create_loraplus_optimizer",
    "explain",
    "functional",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "inject_adapter_in_model",
    "load_peft_weights",
    "nn",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "rescale_adapter_scale",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "use_backend",
]


def __getattr__(name: str) -> object:
    raise AttributeError(
        f"peftk has no {name!r}; if Hugging Face PEFT has it, it is not here yet: docs/methods.md says what is"
    )
