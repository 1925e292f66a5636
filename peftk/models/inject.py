"""Adapters put into a model that stays what it is: no `PeftModel` around it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..nn import AdapterLayer, PeftConfig
from ..nn.base.config import check_bool
from ..nn.base.foreign_config import as_config
from ..nn.lora.start import starts_inside
from .adapters import Tuner
from .state_dict import tuner_of
from .xlora import tuner_for


def inject_adapter_in_model(
    peft_config: PeftConfig | Mapping[str, Any],
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Replace the layers that a configuration names by adapted ones, in place, and return the model itself.

    Further adapters are injected under other names. `get_peft_model_state_dict` and `set_peft_model_state_dict` read
    and write them, with keys that begin at the model. If anything is wrong, the model stays as it is.

    Args:
        peft_config: The method and its targets.
        model: Any nn.Module.
        adapter_name: The name of the adapter.
        low_cpu_mem_usage: Give the adapter's parameters no memory: they are on the meta device until
            ``set_peft_model_state_dict(..., low_cpu_mem_usage=True)`` brings their values.
        state_dict: The adapted layers are those that have tensors in it, whatever `target_modules` says; its values are
            not used.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The method works on whole models, a target is unknown, the name exists, or the adapter starts as a
            part of the base weight (PiSSA, OLoRA) and is to have no memory.
    """
    check_bool("low_cpu_mem_usage", low_cpu_mem_usage)
    config = as_config("peft_config", peft_config)
    if config.is_adaption_prompt or config._alone:
        raise ValueError(f"peft_config: {config._kind} works on a whole model; use get_peft_model")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if state_dict is not None:
        if getattr(config, "target_parameters", None):
            raise ValueError(
                "state_dict: its names do not say which parameters of a module are adapted (target_parameters); inject "
                "the adapter without it, and load the values with set_peft_model_state_dict"
            )
        config = copy.copy(config)
        config.target_modules = _layers_of(state_dict)
    adapted = any(isinstance(module, AdapterLayer) for module in model.modules())
    tuner: Tuner = tuner_of(model)[0] if adapted else tuner_for(model, config)
    tuner._check_new(adapter_name, config)
    if low_cpu_mem_usage and starts_inside(getattr(config, "init_lora_weights", False)):
        raise ValueError(
            f"low_cpu_mem_usage: expected False with init_lora_weights={config.init_lora_weights!r}, whose adapter is "
            "taken out of the base weight when it is made"
        )
    with tuner._whole():
        plan = tuner._plan(adapter_name, config, initialise=not low_cpu_mem_usage)
        tuner._commit(plan)
        model.__dict__["peft_config"] = tuner.peft_config
    return model


def _layers_of(state_dict: Mapping[str, Tensor]) -> set[str]:
    """Return the paths of the layers whose adapters have tensors in a state dict."""
    from ..nn import LAYERS

    containers = {name for layer in LAYERS for name in layer.adapter_layer_names}
    found = set()
    for key in state_dict:
        parts = key.removeprefix("base_model.model.").split(".")
        end = next((i for i, part in enumerate(parts) if part in containers), 0)
        if end:
            found.add(".".join(parts[:end]))
    if not found:
        raise ValueError("state_dict: expected tensors of adapters, such as 'layer.lora_A.weight'; got none")
    return found


__all__ = ["inject_adapter_in_model"]
