"""Writing one adapter of a model to a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..nn.base.offloading import offloaded_values
from .adapters import Tuner
from .batch_statistics import tell_statistics
from .conversion import converted_tensors, converted_values, start_to_subtract
from .embeddings import embeddings_to_save
from .file_keys import as_in_file, check_as_configured, taken_from, unaliased


def save_adapter(
    tuner: Tuner,
    name: str,
    folder: str,
    save_embedding_layers: str | bool,
    initial: str | os.PathLike[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the files of an adapter, by the arguments of `PeftModel.save_pretrained`."""
    from ..checkpoint import peft as files

    plan = tuner._plan_of(name)
    check_as_configured(tuner._layers(), name, plan.config)
    tell_statistics(tuner, plan)
    embeddings = embeddings_to_save(tuner.model, plan, save_embedding_layers)
    own = {**tuner._file_tensors(plan), **embeddings}
    found = _with_memory(tuner, own) if state_dict is None else taken_from(tuner.model, own, state_dict)
    tensors = as_in_file(tuner._layers(), name, plan.config, unaliased(found))
    values, start = _config_values(tuner, name), start_to_subtract(tuner, plan, initial)
    if start is not None:
        tensors, values = converted_tensors(tensors, start), converted_values(plan.config, values)
    os.makedirs(folder, exist_ok=True)
    files.write_adapter(folder, tensors, values)


def _with_memory(tuner: Tuner, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the values in place of tensors that are offloaded."""
    if not any(tensor.is_meta for tensor in tensors.values()):
        return tensors
    values = offloaded_values(tuner.model.modules())
    for key, tensor in tensors.items():
        if tensor.is_meta and id(tensor) not in values:
            raise ValueError(
                f"save_pretrained: {key!r} is on the meta device and no hook of accelerate keeps its values; load or "
                "initialise the adapter first"
            )
    return {key: values.get(id(tensor), tensor) for key, tensor in tensors.items()}


def _config_values(tuner: Tuner, name: str) -> dict[str, Any]:
    values = tuner.peft_config[name].file_values(lambda: tuner._plan_of(name).adapters)
    values["inference_mode"] = True
    if values["task_type"] is None:
        kind = type(tuner.model)
        values["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return values


__all__ = ["save_adapter"]
