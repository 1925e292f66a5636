"""Reading a saved adapter: the file is read, checked and planned in full before the model is touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..nn import PeftConfig
from ..nn.base.config import check_bool
from .adapters import Tuner
from .plan import Plan, copy_into, embedding_tensors, same_meaning
from .targets import resolve


def read_config(folder: str | os.PathLike[str]) -> PeftConfig:
    """Read the configuration of a saved adapter."""
    return PeftConfig.from_dict(config_values(folder))


def config_values(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the content of the configuration file of a saved adapter."""
    from ..checkpoint import peft as files

    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise ValueError(f"model_id: expected the folder of a saved adapter (nothing is downloaded), got {folder!r}")
    return files.read_config(folder)


def read_into_plan(
    tuner: Tuner,
    folder: str | os.PathLike[str],
    name: str,
    is_trainable: bool,
    autocast: bool,
    saved: Mapping[str, Any] | None = None,
) -> tuple[Plan, Callable[[], None]]:
    """Read and check a saved adapter; return its plan and the function that copies the values in, which cannot fail.

    `saved` is the content of the configuration file, if the caller has read it: what it has checked there must be what
    is loaded.
    """
    from ..checkpoint import CheckpointError
    from ..checkpoint import peft as files

    check_bool("is_trainable", is_trainable)
    saved = config_values(folder) if saved is None else saved
    config = PeftConfig.from_dict(saved)
    config.settle_with_file(lambda: _shapes_in(folder))
    config.inference_mode = not is_trainable
    model = tuner.model
    if name in tuner.peft_config:
        plan = tuner.plan_of(name)
        same_meaning(tuner.peft_config[name], config, plan.adapters)
        merged = [path for path, layer in tuner.layers() if name in layer.merged_adapters]
        if merged:
            raise ValueError(f"adapter_name: {name!r} is merged into {merged[0]!r}; unmerge it before loading over it")
        if plan.adapters and set(resolve(model, config, strict=False)) != set(plan.adapters):
            raise ValueError(
                f"target_modules: the file names {config.target_modules}, which are not the modules that adapter "
                f"{name!r} has in memory; load it under a new name"
            )
    else:
        tuner.check_new(name, config)
        plan = tuner.plan(name, config, autocast_adapter_dtype=autocast, initialise=False, strict=False)
    targets = tuner.file_tensors(plan)
    try:
        values = files.read_adapter(folder, *_expected(targets), saved)
    except CheckpointError:
        # PEFT adds whole embeddings to the file of an adapter on the output layer.
        embeddings = embedding_tensors(model, plan)
        if not embeddings:
            raise
        present = _names_in(folder)
        found = {key: tensor for key, tensor in embeddings.items() if key in present}
        if not found:
            raise
        targets.update(found)
        values = files.read_adapter(folder, *_expected(targets), saved)
    _check_not_merged(tuner, targets)
    return plan, lambda: copy_into(targets, values)


def _check_not_merged(tuner: Tuner, targets: dict[str, Tensor]) -> None:
    """Refuse a file with weights or biases of the base model that stand merged: unmerging would undo the load."""
    merged = {
        id(tensor): path
        for path, layer in tuner.layers()
        for key, original in layer._original.items()
        for tensor in (original, getattr(layer.base_layer, key))
    }
    for key, tensor in targets.items():
        if id(tensor) in merged:
            raise ValueError(
                f"model_id: the file holds {key!r}, a tensor of the base model, and adapters are merged into it at "
                f"{merged[id(tensor)]!r}; unmerge them before loading"
            )


def _expected(targets: dict[str, Tensor]) -> tuple[dict[str, torch.Size], dict[str, torch.dtype]]:
    shapes = {key: tensor.shape for key, tensor in targets.items()}
    return shapes, {key: tensor.dtype for key, tensor in targets.items() if not tensor.is_floating_point()}


def _names_in(folder: str) -> set[str]:
    return set(_shapes_in(folder))


def _shapes_in(folder: str) -> dict[str, torch.Size]:
    from ..checkpoint import CheckpointError, read_safetensors
    from ..checkpoint.peft import WEIGHTS_NAME

    try:
        tensors = read_safetensors(os.path.join(folder, WEIGHTS_NAME))
    except CheckpointError:
        # What is wrong with it is said by `read_adapter`.
        return {}
    return {key: tensor.shape for key, tensor in tensors.items()}
