"""A plugin of pytest that puts peftk in the place of Hugging Face PEFT, for PEFT's own tests; see `tools.peft_tests`.

Every module of the name `peft` has peftk's objects of the same names. What peftk does not have is a class
or a function that skips the test which uses it, with the reason "refused by name".
"""

from __future__ import annotations

import abc
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

SWITCH = "PEFTK_IN_PLACE"
REFUSED = "refused by name"


class _BaseTunerLayer(abc.ABC):  # noqa: B024 - Nothing is made of it: isinstance asks it.
    """Stands for every adapted layer."""


class Refused:
    """Stands for a class of PEFT that peftk does not have; lists of parameters hold objects of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.given = args, kwargs

    def __getattr__(self, name: str) -> Any:
        if name[:1] == "_":
            raise AttributeError(name)
        return _refuse(type(self).__name__)


def _refuse(name: str) -> None:
    import pytest

    pytest.skip(f"{REFUSED}: {name}")


def _known() -> dict[str, Any]:
    """Return the objects of peftk that PEFT has under other names, or in its inner modules."""
    import peftk
    from peftk.models import tuners
    from peftk.nn.base.adapter_layer import AdapterLayer
    from peftk.nn.base.saved import ModulesToSaveWrapper
    from peftk.nn.lora.layer import LoRALayer
    from peftk.nn.trainable_tokens import TrainableTokens

    _BaseTunerLayer.register(AdapterLayer)
    methods = {c: getattr(tuners, c.__name__.replace("Config", "Model"), None) for c in _configs(peftk)}
    return {
        "AuxiliaryTrainingWrapper": ModulesToSaveWrapper,
        "BaseTunerLayer": _BaseTunerLayer,
        "CONFIG_NAME": "adapter_config.json",
        "INCLUDE_LINEAR_LAYERS_SHORTHAND": "all-linear",
        "LoraLayer": LoRALayer,
        "ModulesToSaveWrapper": ModulesToSaveWrapper,
        "PEFT_TYPE_TO_CONFIG_MAPPING": {c._method: c for c in methods},
        "PEFT_TYPE_TO_TUNER_MAPPING": {c._method: tuner for c, tuner in methods.items()},
        "PeftWarning": UserWarning,
        "SAFETENSORS_WEIGHTS_NAME": "adapter_model.safetensors",
        "TrainableTokensWrapper": TrainableTokens,
        "_get_submodules": _get_submodules,
        "infer_device": lambda: "cpu",
        "is_transformers_ge_v5": True,
    }


def _configs(peftk: Any) -> list[Any]:
    return list(peftk.PeftConfig._by_type.values())


def _get_submodules(model: Any, key: str) -> tuple[Any, Any, str]:
    parent = model.get_submodule(key.rpartition(".")[0])
    return parent, model.get_submodule(key), key.rpartition(".")[2]


_LAYERS = {"Linear": "LoRALinear", "Conv1d": "LoRAConv", "Conv2d": "LoRAConv", "Conv3d": "LoRAConv"}
_LAYERS |= {"Embedding": "LoRAEmbedding"}


class _Place(types.ModuleType):
    """A module of the name of one of PEFT's."""

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__":
            raise AttributeError(name)
        import peftk

        known = _known()
        if name in known:
            found = known[name]
        elif self.__name__.startswith("peft.tuners.lora") and name in _LAYERS:
            found = getattr(peftk.nn, _LAYERS[name])
        elif name in peftk.__all__:
            found = getattr(peftk, name)
        elif name.startswith("is_") and name.endswith("_available"):
            found = lambda: False  # noqa: E731 - One of many values.
        elif name.islower() and self.__name__ in ("peft", "peft.tuners"):
            package = name in _PACKAGES or name.upper() in peftk.PeftType.__members__
            return importlib.import_module(f"{self.__name__}.{name}") if package else _missing(name)
        else:
            found = _missing(name)
        setattr(self, name, found)
        return found


_PACKAGES = ("tuners", "utils", "mapping", "helpers")


def _missing(name: str) -> Any:
    if name[:1].islower() or name.startswith("_"):
        return lambda *args, **kwargs: _refuse(name)
    return type(name, (Refused,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.partition(".")[0] != "peft":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Place(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0.21.2"  # type: ignore[attr-defined]


if os.environ.get(SWITCH):
    for loaded in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        del sys.modules[loaded]
    sys.meta_path.insert(0, _Finder())
