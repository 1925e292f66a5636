"""Under which key each tensor of an adapter stands in PEFT's file, and when a file means what the model means."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..checkpoint.container import shown
from ..nn import PeftConfig
from ..nn.base.adapter_layer import AdapterLayer
from ..nn.base.saved import ModulesToSaveWrapper
from .names import clean_state, is_inside, unwrapped, without_wrappers
from .plan import PATTERNS, Plan
from .targets import HEADS, candidates

PREFIX = "base_model.model."


def biases(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Yield the file key and the tensor of every bias of the base model that the configuration trains."""
    mode = plan.config.bias_mode
    if mode == "none":
        return
    root = unwrapped(model)._parameters.get("bias")
    if mode == "all" and root is not None:
        yield "bias", root
    for path, module in candidates(model).items():
        # The keys are those that the file has when this is the model's only adapter.
        if path in plan.adapters:
            if getattr(module, "bias", None) is not None:
                yield f"{path}.base_layer.bias", _own_bias(module)
        elif mode != "all" or is_inside(path, plan.saved):
            continue
        elif isinstance(module, AdapterLayer):
            if module.bias is not None:
                yield f"{path}.bias", _own_bias(module)
        elif isinstance(module, ModulesToSaveWrapper) or path in plan.saved:
            inner = f"{path}.original_module" if path in plan.saved else path
            for name, tensor in state_of(getattr(module, "original_module", module)):
                if name == "bias" or name.endswith(".bias"):
                    yield f"{inner}.{name}", tensor
        else:
            own: Tensor | None = module._parameters.get("bias")
            if own is None and "bias" not in module._non_persistent_buffers_set:
                own = module._buffers.get("bias")
            if own is not None:
                yield f"{path}.bias", own


def _own_bias(module: nn.Module) -> Tensor:
    """Return the bias of a layer without what is merged into it."""
    return getattr(module, "_original", {}).get("bias", module.bias)


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a state dict of the module holds, under names without wrappers."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        yield clean_state(module, name), tensor


def file_tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Map every key that PEFT writes for this adapter to the tensor that it stands for.

    The mapping is the same before and after the plan is attached. The adapter's name is in no key.
    """
    tensors: dict[str, Tensor] = {
        f"{path}.{name}": tensor
        for path, adapter in (*plan.adapters.items(), *plan.tokens.items())
        for name, tensor in adapter.saved_tensors()
    }
    for path, module in plan.saved.items():
        for name, tensor in state_of(module):
            tensors[f"{path}.{name}"] = tensor
            # With bias="all" PEFT writes the biases of these modules a second time, under the wrapper's own name.
            if plan.config.bias_mode == "all" and (name == "bias" or name.endswith(".bias")):
                inner = name if name == "bias" else f"{plan.name}.{name}"
                tensors[f"{path}.modules_to_save.{inner}"] = tensor
    tensors.update(biases(model, plan))
    return {PREFIX + key: tensor for key, tensor in tensors.items()}


def as_in_file(
    layers: Iterable[tuple[str, AdapterLayer]], name: str, config: PeftConfig, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Change tensors of an adapter into those that a file of `config` has, where the adapter is larger in memory.

    Args:
        layers: Path and layer of every adapted layer.
        name: The adapter; there is nothing to change where no layer has it yet.
        config: The configuration.
        tensors: File key to tensor.
    """
    for path, layer in layers:
        if name in layer.adapter_names and isinstance(config, layer.config_class):
            layer.as_in_file(name, config, path, tensors, f"{PREFIX}{path}.")
    return tensors


def without_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the same shapes and dtypes, for those who ask for nothing else."""
    return {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items()}


def check_as_configured(layers: Iterable[tuple[str, AdapterLayer]], name: str, config: PeftConfig) -> None:
    """Raise ValueError if `update_layer` has given an adapter other settings than its configuration says."""
    for path, layer in layers:
        if name in layer.updated:
            try:
                same_meaning(layer.updated[name], config, [path])
            except ValueError as error:
                raise ValueError(
                    f"save_pretrained: update_layer of module {path!r} has changed {name!r}, and its "
                    f"configuration, which the file would have, says something else: {error}; change the fields of "
                    f"model.peft_config[{name!r}] too"
                ) from None


def as_in_memory(
    layers: Iterable[tuple[str, AdapterLayer]], name: str, config: PeftConfig, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Undo what `as_in_file` does, of values that were read from a file; arguments as there."""
    for path, layer in layers:
        if name in layer.adapter_names and isinstance(config, layer.config_class):
            layer.as_in_memory(name, config, path, tensors, f"{PREFIX}{path}.")
    return tensors


def unaliased(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detach tensors for a file, and copy those whose memory an earlier one of them uses."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def taken_from(model: nn.Module, tensors: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace tensors of a model by those that a state dict of the model, or of its base model, has for them."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
    given = {without_wrappers(key).removeprefix(PREFIX): value for key, value in state_dict.items()}
    paths: dict[int, str] = {}
    for held in (model.named_parameters, model.named_buffers):
        for path, tensor in held(remove_duplicate=False):
            paths.setdefault(id(tensor), without_wrappers(path))
    found, missing = {}, []
    for key, tensor in tensors.items():
        path = paths.get(id(tensor), key.removeprefix(PREFIX))
        if path in given:
            found[key] = given[path]
        else:
            missing.append(path)
    if missing:
        raise ValueError(
            f"state_dict: expected the state dict of the whole model; {shown(sorted(missing))} of the adapter are "
            "missing. Gather it with state_dict() of the outermost wrapper, or accelerator.get_state_dict(model)"
        )
    return found


def same_meaning(ours: PeftConfig, theirs: PeftConfig, paths: Iterable[str]) -> None:
    """Raise ValueError if tensors trained under `theirs` on the modules `paths` mean something else under `ours`."""
    if type(ours) is not type(theirs):
        raise ValueError(f"adapter: the file is a {theirs._kind}, the loaded adapter a {ours._kind}")
    for field in dataclasses.fields(ours):
        if field.name not in ours._meaning:
            continue
        a, b = ours._meant(field.name), theirs._meant(field.name)
        if field.name == "modules_to_save":
            a, b = set(a or ()), set(b or ()) | set(HEADS.get(theirs.task_type or "", ()))
        differ = a != b
        if field.name in PATTERNS:
            # What counts is what each module gets; that depends on the order of the keys too.
            differ = any(a.get(ours.pattern_key(a, path)) != b.get(theirs.pattern_key(b, path)) for path in paths)
        if differ:
            raise ValueError(f"{field.name}: the file has {b!r}, the adapter in memory {a!r}; load it under a new name")
