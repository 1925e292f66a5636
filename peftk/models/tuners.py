"""What holds the adapters of a model, under the name of the method of the first one, as in Hugging Face PEFT.

`LoraModel` and its like are made for every method that has layers: a new method's needs no line here.
"""

from __future__ import annotations

from ..nn import LAYERS, PeftConfig
from .adapters import Tuner

_TUNERS: dict[type[PeftConfig], type[Tuner]] = {}


def tuner_class(config: type[PeftConfig]) -> type[Tuner]:
    """Return the class that holds adapters of a model whose first one has a configuration of this class."""
    if config in _TUNERS:
        return _TUNERS[config]
    container = next(layer for layer in LAYERS if layer.config_class is config).adapter_layer_names[0]
    contents = {
        "__module__": __name__,
        "__doc__": f"Holds the adapted model; its first adapter has a `{config.__name__}`.",
        "prefix": container.partition("_")[0] + "_",
    }
    _TUNERS[config] = type(_name(config), (Tuner,), contents)
    return _TUNERS[config]


def _name(config: type[PeftConfig]) -> str:
    return config.__name__.removesuffix("Config") + "Model"


def __getattr__(name: str) -> type[Tuner]:
    for config in {layer.config_class for layer in LAYERS}:
        if config._method is not None and _name(config) == name:
            return tuner_class(config)
    raise AttributeError(f"module {__name__} has no {name!r}")
