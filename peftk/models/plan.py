"""What an adapter adds to a model, made in full before the model is touched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from dataclasses import field as dataclass_field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.container import shown
from ..nn import PeftConfig, check_known, layer_class_for
from ..nn.base.adapter_layer import Adapter, AdapterLayer
from ..nn.base.config import warn_of_field
from ..nn.base.offloading import copy_onloaded
from ..nn.base.saved import ModulesToSaveWrapper
from ..nn.trainable_tokens import TrainableTokens
from .names import place_of
from .parameters import attach_parameters, plan_parameters, warn_of_stacks
from .targets import ALL_LINEAR, HEADS, candidates, describe_unknown, places, resolve, resolve_saved
from .ties import tie_copies
from .tokens import layers_for, plan_tokens, tokens_of

PATTERNS = ("rank_pattern", "alpha_pattern", "block_size_pattern")


@dataclass
class Plan:
    """Everything that one adapter consists of on one model.

    Attributes:
        name: The adapter's name.
        config: Its configuration, with the targets filled in.
        adapters: Module path to the adapter on that layer.
        saved: Module path to the adapter's own copy of a module in `modules_to_save`.
        tokens: Module path to the rows of an embedding that the adapter trains.
        tied: Path of a layer that shares the weight of an embedding in `tokens` to the path of that embedding.
    """

    name: str
    config: PeftConfig
    adapters: dict[str, Adapter]
    saved: dict[str, nn.Module]
    tokens: dict[str, Adapter] = dataclass_field(default_factory=dict)
    tied: dict[str, str] = dataclass_field(default_factory=dict)

    def materialise(self) -> None:
        """Give memory, with any values, to what was planned without."""
        for path, adapter in (*self.adapters.items(), *self.tokens.items()):
            if adapter.device is not None and adapter.device.type == "meta":
                raise ValueError(
                    f"module {path!r}: its weight is on the meta device, so the adapter has no place; load the "
                    "weights of the base model before its adapters"
                )
        for adapter in (*self.adapters.values(), *self.tokens.values()):
            adapter.materialise()

    def changed(self) -> list[Tensor]:
        """Return the tensors of the model whose numbers change when the plan is attached."""
        return []


def make_plan(
    model: nn.Module,
    name: str,
    config: PeftConfig,
    *,
    autocast_adapter_dtype: bool = True,
    initialise: bool = True,
    strict: bool = True,
) -> Plan:
    """Make all tensors of a new adapter without touching the model or `config`.

    Without `initialise` they have shapes and no memory; see `Plan.materialise`.
    """
    check_known(config)
    config = copy.deepcopy(config)
    asked = list(getattr(config, "modules_to_save", None) or ()) if strict else []
    if config.task_type in HEADS and hasattr(config, "modules_to_save"):
        heads = [head for head in HEADS[config.task_type] if head not in (config.modules_to_save or ())]
        asked = [head for head in asked if head not in HEADS[config.task_type]]
        config.modules_to_save = [*(config.modules_to_save or ()), *heads]
    modules, held = candidates(model), places(model)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        warn_of_stacks(model, config)
    adapters = {}
    for path in resolve(model, config, strict=strict):
        module = modules[path]
        if isinstance(module, AdapterLayer):
            if module.config_class is not type(config):
                raise ValueError(
                    f"target_modules: module {path!r} has a {type(module).__name__} already; two methods cannot share "
                    "a layer"
                )
            try:
                module.check_add(config, initialise)
            except ValueError as error:
                raise ValueError(f"module {path!r}: {error}") from None
            module = module.base_layer
        elif len(held[id(module)]) > 1:
            others = [place for place in held[id(module)] if place != path]
            warnings.warn(
                f"target_modules: module {path!r} is {others} too; it is adapted where it is {path!r} only, and cannot "
                "be merged",
                stacklevel=3,
            )
        adapters[path] = layer_class_for(config, module, path).make(
            module, config, path, autocast_adapter_dtype=autocast_adapter_dtype, initialise=initialise
        )
    options = {"autocast_adapter_dtype": autocast_adapter_dtype, "initialise": initialise}
    adapters |= plan_parameters(model, config, modules, adapters, **options)
    _check_patterns(config, [adapter.target or path for path, adapter in adapters.items()], strict)
    saved, ensured = {}, bool(getattr(config, "ensure_weight_tying", False))
    found = resolve_saved(model, config, asked)
    owners = _owners(model) if found else {}
    for path in found:
        module = modules[path]
        if not ensured:
            _tell_shared(path, module, held, owners)
        saved[path] = copy_onloaded(getattr(module, "original_module", module))
    tied = ensured and tie_copies(modules, saved, adapters)
    plan = Plan(name, config, adapters, saved, *plan_tokens(model, config, {**adapters, **saved}, **options))
    if ensured and not tied and not plan.tied:
        warnings.warn("ensure_weight_tying: nothing that the adapter trains shares its weight", stacklevel=3)
    return plan


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Map the id of every parameter to all its names."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _tell_shared(path: str, module: nn.Module, held: dict[int, list[str]], owners: dict[int, list[str]]) -> None:
    """Warn where a module that is to be trained in full, or a parameter of it, is in other places too."""
    if isinstance(module, ModulesToSaveWrapper):
        return
    others = [place for place in held.get(id(module), ()) if place != path]
    if others:
        warnings.warn(
            f"modules_to_save: module {path!r} is {shown(others)} too; its trained copy is used where the model calls "
            f"it {path!r} only, and never if it calls it by another name: name that one",
            stacklevel=4,
        )
        return
    names = (name for parameter in module.parameters() for name in owners[id(parameter)])
    tied = [name for name in names if not name.startswith(f"{path}.")]
    if tied:
        warnings.warn(
            f"modules_to_save: module {path!r} shares its weight with {shown(tied)}; the trained copy has one of its "
            "own, and the other place keeps the values of the base model",
            stacklevel=4,
        )


def _check_patterns(config: PeftConfig, names: Collection[str], strict: bool) -> None:
    for field in PATTERNS:
        unused = config.unused_keys(getattr(config, field, None) or {}, names)
        if unused:
            what = describe_unknown(unused, names) if strict else shown(unused)
            warn_of_field(f"{field}: these keys match no adapted module and have no effect: {what}", stacklevel=3)


def plan_of(model: nn.Module, name: str, config: PeftConfig) -> Plan:
    """Describe an adapter that the model has already."""
    adapters, saved = {}, {}
    for path, module in candidates(model).items():
        if isinstance(module, TrainableTokens):
            continue
        if isinstance(module, AdapterLayer) and name in module.adapter_names:
            adapters[path] = module.adapter(name)
        elif isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            saved[path] = module.modules_to_save[name]
    return Plan(name, config, adapters, saved, *tokens_of(model, name))


def attach(model: nn.Module, plan: Plan) -> None:
    """Put the tensors of a plan into the model; nothing is active yet."""
    modules = candidates(model)
    attach_parameters(model, plan.adapters, plan.name)
    for path, adapter in plan.adapters.items():
        if adapter.target:
            continue
        layer = modules[path]
        if not isinstance(layer, AdapterLayer):
            layer = adapter.layer_class.around(layer, path)
            replace_module(model, path, layer)
        layer.attach(plan.name, adapter)
    for path, module in plan.saved.items():
        wrapper = modules[path]
        if not isinstance(wrapper, ModulesToSaveWrapper):
            wrapper = ModulesToSaveWrapper(wrapper)
            replace_module(model, path, wrapper)
        wrapper.attach(plan.name, module)
    for path, tokens, adapter in layers_for(modules, plan.tokens, plan.tied):
        if modules[path] is not tokens:
            replace_module(model, path, tokens)
        tokens.attach(plan.name, adapter)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` is."""
    parent, name = place_of(model, path)
    setattr(parent, name, module)
    if hasattr(parent, "_torchdynamo_orig_callable") and callable(initialize := getattr(parent, "_initialize", None)):
        # A compiled module remembers what it calls.
        initialize()
    if isinstance(parent, nn.TransformerEncoderLayer):
        _choose_path(parent)


def _choose_path(layer: nn.TransformerEncoderLayer) -> None:
    """Keep torch's fused evaluation path, which reads weights and calls no submodule, off an adapted layer."""
    adapted = any(isinstance(child, AdapterLayer) for child in layer.children())
    if adapted:
        layer.activation_relu_or_gelu = 0
    elif layer.activation is F.relu or isinstance(layer.activation, nn.ReLU):
        layer.activation_relu_or_gelu = 1
    elif layer.activation is F.gelu or isinstance(layer.activation, nn.GELU):
        layer.activation_relu_or_gelu = 2


@torch.no_grad()
def copy_into(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy values that were read, and checked to fit, into the tensors of the model."""
    for key, value in values.items():
        targets[key].copy_(value)
