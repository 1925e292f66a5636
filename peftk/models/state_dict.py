"""The tensors of one adapter in memory, under the keys that they have in a file: out of a model, and into it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.hub import local_folder
from ..checkpoint.key_mapping import check_key_mapping, renamer
from ..nn import AdapterLayer
from ..nn.base.config import check_bool, check_choice
from ..nn.base.memory import with_memory
from .adapters import Tuner
from .embeddings import embedding_tensors, embeddings_to_save
from .file_keys import PREFIX, as_in_file, as_in_memory, taken_from, unaliased
from .loading import LoadResult, check_not_merged, check_there
from .names import unwrapped, without_wrappers


def tuner_of(model: nn.Module, argument: str = "model") -> tuple[Tuner, str]:
    """Return what manages the adapters of a model, and the prefix of their keys.

    Args:
        model: A PeftModel, or a model into which `inject_adapter_in_model` has put adapters.
        argument: What messages call it.

    Raises:
        TypeError: It is no module.
        ValueError: It has no adapters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument}: expected an nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    if isinstance(model, Tuner):
        return model, PREFIX
    held = model._modules.get("base_model")
    if isinstance(held, Tuner):
        return held, PREFIX
    injected = model.__dict__.get("peft_config")
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    if not layers or not isinstance(injected, dict):
        raise ValueError(
            f"{argument}: expected a PeftModel, or a model with adapters of peftk.inject_adapter_in_model, got "
            f"{type(model).__name__} without adapters of peftk; for a model of Hugging Face PEFT call its own function"
        )
    tuner = Tuner(model)
    tuner.peft_config, tuner.active_adapters = injected, list(layers[0].active_adapters)
    return tuner, ""


def _adapter(tuner: Tuner, name: str) -> str:
    return tuner._known([name])[0]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Return the tensors of one adapter under the keys that they have in a file of Hugging Face PEFT.

    Args:
        model: A PeftModel, or a model with injected adapters, whose keys have no ``base_model.model.`` in front.
        state_dict: Take the values from this one, which the whole model's `state_dict` has the keys of, as one
            gathers it under FSDP; None takes them from the model.
        adapter_name: The adapter.
        unwrap_compiled: Accepted for scripts that pass it: wrappers of `torch.compile` and the like never count.
        save_embedding_layers: As in `PeftModel.save_pretrained`.

    Raises:
        ValueError: There is no such adapter, or a tensor of it is missing from `state_dict`.
    """
    check_choice("save_embedding_layers", save_embedding_layers, ("auto", True, False))
    tuner, prefix = tuner_of(model)
    plan = tuner._plan_of(_adapter(tuner, adapter_name))
    embeddings = embeddings_to_save(tuner.model, plan, save_embedding_layers)
    tensors = {**tuner._file_tensors(plan), **embeddings}
    if state_dict is not None:
        tensors = taken_from(tuner.model, tensors, state_dict)
    found = as_in_file(tuner._layers(), adapter_name, plan.config, unaliased(tensors))
    return {prefix + key.removeprefix(PREFIX): tensor for key, tensor in found.items()}


@torch.no_grad()
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy tensors with the keys of a file into an adapter that the model has; nothing is written if one is refused.

    Args:
        model: A PeftModel, or a model with injected adapters.
        peft_model_state_dict: Key to tensor, as `get_peft_model_state_dict` and `load_peft_weights` return them.
        adapter_name: The adapter.
        ignore_mismatched_sizes: Leave tensors of another shape out, with a warning, instead of raising.
        low_cpu_mem_usage: Give memory to those parameters of the adapter that were injected without, and get a value.

    Returns:
        The keys without a partner, on either side.

    Raises:
        ValueError: There is no such adapter, it is merged, or what is to be written is on the meta device.
        RuntimeError: A shape differs.
    """
    check_bool("low_cpu_mem_usage", low_cpu_mem_usage)
    tuner, _ = tuner_of(model)
    plan = tuner._plan_of(_adapter(tuner, adapter_name))
    if not isinstance(peft_model_state_dict, Mapping):
        raise TypeError(f"peft_model_state_dict: expected a dict, got {type(peft_model_state_dict).__name__}")
    given = {PREFIX + without_wrappers(k).removeprefix(PREFIX): (k, v) for k, v in peft_model_state_dict.items()}
    larger = as_in_memory(tuner._layers(), plan.name, plan.config, {key: value for key, (_, value) in given.items()})
    given = {key: (name, larger[key]) for key, (name, _) in given.items()}
    # A trained bias of the base model may be in a dict, although this adapter's configuration does not train it.
    own = tuner.model.state_dict(keep_vars=True).items()
    targets = {PREFIX + without_wrappers(name): tensor for name, tensor in own}
    adapters = tuner._file_tensors(plan)
    targets |= {**embedding_tensors(tuner.model, plan, copies=True), **adapters}
    values, unexpected, mismatched = {}, [], []
    for key, (name, value) in given.items():
        if key not in targets:
            unexpected.append(name)
        elif targets[key].shape != value.shape:
            mismatched.append(f"{name}: {tuple(value.shape)}, and the model has {tuple(targets[key].shape)}")
        else:
            values[key] = value
    if mismatched and not ignore_mismatched_sizes:
        raise RuntimeError(f"peft_model_state_dict: size mismatch for {'; '.join(mismatched)}")
    check_not_merged(tuner, {key: targets[key] for key in values})
    empty = {key: adapters[key] for key in values if low_cpu_mem_usage and key in adapters and adapters[key].is_meta}
    check_there({key: targets[key] for key in values if key not in empty})
    targets |= _given_memory(tuner, empty)
    if mismatched:
        warnings.warn(
            f"peft_model_state_dict: left out, because ignore_mismatched_sizes is True: {'; '.join(mismatched)}",
            stacklevel=2,
        )
    for key, value in values.items():
        targets[key].copy_(value)
    written = {id(targets[key]) for key in values}
    missing = [
        name for name, tensor in unwrapped(model).state_dict(keep_vars=True).items() if id(tensor) not in written
    ]
    return LoadResult(missing, unexpected)


def _given_memory(tuner: Tuner, empty: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put parameters with memory, where the weight of the layer is, in the place of some without, and return them."""
    keys = {id(tensor): key for key, tensor in empty.items()}
    places = [
        (keys[id(parameter)], module, name, parameter, layer.base_layer.weight)
        for _, layer in (tuner._layers() if empty else ())
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in keys
    ]
    check_there({key: weight for key, *_, weight in places})
    found: dict[str, Tensor] = {}
    for key, module, name, parameter, weight in places:
        module._parameters[name] = found[key] = with_memory(parameter, weight.device)
    return found


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """Read the tensors of a saved adapter, with all checks that a file alone allows.

    Args:
        model_id: A folder, or the name of a repository, through `huggingface_hub`.
        device: Where the tensors go; None means the CPU, on which nothing is copied twice.
        key_mapping: As in `PeftModel.from_pretrained`.
        **hub: `subfolder`, `revision`, `token` and the like; see `PeftModel.from_pretrained`.

    Raises:
        ValueError: The file is missing or damaged.
    """
    from ..checkpoint import peft as files

    check_key_mapping(key_mapping)
    tensors = files.read_tensors(local_folder(model_id, **hub))
    if key_mapping is not None:
        rename = renamer(key_mapping)
        tensors = {rename(key): tensor for key, tensor in tensors.items()}
    return tensors if device is None else {key: tensor.to(device) for key, tensor in tensors.items()}


__all__ = ["LoadResult", "get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"]
