"""What adapters a model has, layer by layer and as a whole, in the words of Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..methods._base_layer import kind_of
from ..nn import AdapterLayer, PeftType
from ..nn.base.kinds import quantised_by
from ..nn.base.saved import ModulesToSaveWrapper
from .adapters import Tuner
from .names import named_modules

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """The state of one adapted layer, or of one module that is trained in full.

    Attributes:
        name: Its path in the model.
        module_type: What PEFT calls its class, such as "lora.Linear".
        enabled: Whether its adapters are switched on.
        active_adapters: The names of those that act.
        merged_adapters: The names of those that are merged into the base weight.
        requires_grad: Adapter name to whether it is trained; "irregular" if only a part of it is.
        available_adapters: The names of all of them, sorted.
        devices: Adapter name to the kinds of devices that hold it.
        quantization_backend: What quantised the base layer: "bnb 4bit", "bnb 8bit", "torchao", the type of its weight
            if it is none of these, or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The state of a model: each value is what its layers agree on, or "irregular" where they do not.

    Attributes:
        base_model_type: The class of the base model; "other" for a module that is no PeftModel.
        adapter_model_type: The class that holds the adapters, or "None".
        peft_types: Adapter name to method.
        trainable_params: How many parameters are trained.
        total_params: How many parameters there are.
        num_adapter_layers: How many layers are adapted or trained in full.
        enabled: As in `TunerLayerStatus`, and so are the remaining ones.
        active_adapters: The active adapters.
        merged_adapters: The merged adapters.
        requires_grad: Adapter name to whether it is trained.
        available_adapters: The names of all adapters, sorted.
        devices: Adapter name to the kinds of devices that hold it.
        quantization_backend: As in `TunerLayerStatus`.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None = None


def count_parameters(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Return how many parameters are trained, and how many there are; bitsandbytes packs several into an element."""
    trained, total = 0, 0
    for p in parameters:
        packed = type(p).__name__ == "Params4bit" and getattr(p, "bnb_quantized", False)
        count = p.numel() * (2 * p.element_size() if packed else 1)
        trained, total = trained + count * p.requires_grad, total + count
    return trained, total


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the state of every adapted layer of a model, in the order of the model.

    Args:
        model: A PeftModel, or any module that holds adapted layers.

    Raises:
        TypeError: `model` is no module.
        ValueError: It has no adapted layer.

    Example:
        >>> import torch, peftk
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = peftk.get_peft_model(base, peftk.LoraConfig(r=1, target_modules=["0"]))
        >>> peftk.get_layer_status(model)[0].requires_grad
        {'default': True}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    tuner = _tuner_of(model)
    found = model if tuner is None else tuner
    layers = [
        _layer_status(name, module)
        for name, module in named_modules(found)
        if isinstance(module, (AdapterLayer, ModulesToSaveWrapper))
    ]
    if not layers:
        raise ValueError("model: it has no adapted layer")
    return layers


def _tuner_of(model: nn.Module) -> Tuner | None:
    """Return what holds the adapters of a PeftModel; no property of the model is asked."""
    found = model._modules.get("base_model")
    return found if isinstance(found, Tuner) else None


def _layer_status(name: str, module: AdapterLayer | ModulesToSaveWrapper) -> TunerLayerStatus:
    if isinstance(module, ModulesToSaveWrapper):
        parts: dict[str, list[nn.Module | nn.Parameter]]
        parts = {adapter: [copy] for adapter, copy in module.modules_to_save.items()}
        merged, quantised = [], None
    else:
        merged, quantised = module.merged_adapters, quantised_by(module.base_layer)
        parts = {
            adapter: [p for name, p in module.adapter(adapter).parts.items() if name not in module.constant_names]
            for adapter in module.adapter_names
        }
    parameters = {adapter: [p for part in found for p in _parameters(part)] for adapter, found in parts.items()}
    return TunerLayerStatus(
        name=name,
        module_type=_class_of_peft(module),
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(merged),
        requires_grad={a: _agreed(p.requires_grad for p in found) for a, found in parameters.items()},
        available_adapters=sorted(parts),
        devices={a: sorted({p.device.type for p in found}) for a, found in parameters.items()},
        quantization_backend=quantised,
    )


def _class_of_peft(module: AdapterLayer | ModulesToSaveWrapper) -> str:
    """Return what PEFT calls the class of an adapted layer; a class that it does not have is called by its own name."""
    kind = kind_of(module.base_layer) if isinstance(module, AdapterLayer) else None
    if not isinstance(module, AdapterLayer) or kind is None or module.config_class._method is None:
        return type(module).__name__
    kind = "Linear" if kind == "Conv1D" else kind
    return f"{module.config_class._method.value.lower()}.{module.peft_class_prefix}{kind}"


def _parameters(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def _agreed(values: Iterable[Any], default: object = False) -> Any:
    """Return the value that all have, or "irregular"."""
    first, *others = [*values] or [default]
    return first if all(other == first for other in others) else "irregular"


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the state of a model's adapters as a whole.

    Args:
        model: A PeftModel, or any module that holds adapted layers.

    Raises:
        TypeError: `model` is no module.
        ValueError: It has no adapted layer.

    Example:
        >>> import torch, peftk
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = peftk.get_peft_model(base, peftk.LoraConfig(r=1, target_modules=["0"]))
        >>> peftk.get_model_status(model).peft_types
        {'default': 'LORA'}
    """
    layers = get_layer_status(model)
    adapters = sorted({adapter for layer in layers for adapter in layer.available_adapters})
    trained, total = count_parameters(model.parameters())
    tuner = _tuner_of(model)

    def of_adapter(values: Callable[[TunerLayerStatus], dict[str, Any]]) -> dict[str, Any]:
        return {a: [values(layer)[a] for layer in layers if a in layer.available_adapters] for a in adapters}

    # A layer that lacks an adapter neither merges nor activates it.
    merged = [
        {adapter: adapter in layer.merged_adapters for adapter in layer.available_adapters}
        for layer in layers
        if layer.module_type != ModulesToSaveWrapper.__name__
    ]
    states = {a: _agreed(state[a] for state in merged if a in state) for a in adapters}
    return TunerModelStatus(
        base_model_type="other" if tuner is None else type(tuner.model).__name__,
        adapter_model_type="None" if tuner is None else type(tuner).__name__,
        peft_types={} if tuner is None else {a: PeftType(c.peft_type).value for a, c in tuner.peft_config.items()},
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters=_agreed(
            layer.active_adapters for layer in layers if layer.module_type != ModulesToSaveWrapper.__name__
        ),
        merged_adapters="irregular" if "irregular" in states.values() else [a for a in adapters if states[a]],
        requires_grad={a: _agreed(found) for a, found in of_adapter(lambda layer: layer.requires_grad).items()},
        available_adapters=adapters,
        devices={
            a: sorted({kind for kinds in found for kind in kinds})
            for a, found in of_adapter(lambda layer: layer.devices).items()
        },
        quantization_backend=_agreed(
            layer.quantization_backend for layer in layers if layer.module_type != ModulesToSaveWrapper.__name__
        ),
    )


__all__ = ["TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"]
