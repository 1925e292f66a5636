"""What holds the adapters of a model, under the name of the method of the first one, as in Hugging Face PEFT."""

from __future__ import annotations

from ..nn import (
    LAYERS,
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    C3AConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
)
from .adapters import Tuner

_TUNERS: dict[type[PeftConfig], type[Tuner]] = {}


def _tuner(config: type[PeftConfig]) -> type[Tuner]:
    name = config.__name__.removesuffix("Config") + "Model"
    container = next(layer for layer in LAYERS if layer.config_class is config).adapter_layer_names[0]
    contents = {
        "__module__": __name__,
        "__doc__": f"{Tuner.__doc__.splitlines()[0] if Tuner.__doc__ else ''} The first one is of `{config.__name__}`.",
        "prefix": container.partition("_")[0] + "_",
    }
    _TUNERS[config] = type(name, (Tuner,), contents)
    return _TUNERS[config]


LoraModel = _tuner(LoraConfig)
AdaLoraModel = _tuner(AdaLoraConfig)
LoHaModel = _tuner(LoHaConfig)
LoKrModel = _tuner(LoKrConfig)
OFTModel = _tuner(OFTConfig)
BOFTModel = _tuner(BOFTConfig)
C3AModel = _tuner(C3AConfig)
AdaptionPromptModel = _tuner(AdaptionPromptConfig)


def tuner_class(config: PeftConfig) -> type[Tuner]:
    """Return the class that holds adapters of a model whose first one has this configuration."""
    return _TUNERS[type(config)]


__all__ = [
    "AdaLoraModel",
    "AdaptionPromptModel",
    "BOFTModel",
    "C3AModel",
    "LoHaModel",
    "LoKrModel",
    "LoraModel",
    "OFTModel",
    "tuner_class",
]
