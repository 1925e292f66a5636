"""Adapter files of other programs, loaded as if PEFT had written them."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from ..checkpoint.container import CheckpointError
from ..checkpoint.foreign import as_peft
from ..checkpoint.peft import write_adapter
from ..checkpoint.reader import read_safetensors
from ..nn import PeftConfig
from ..nn.base.adapter_layer import AdapterLayer
from ..nn.base.config import LayerInFile
from .targets import candidates

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def peft_folder(model: nn.Module, model_id: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """Give what `model_id` names: itself, or for the file of another program a folder as PEFT writes it.

    Args:
        model: The base model, or one with adapters, whose modules the file names.
        model_id: A folder, the name of a repository, or a safetensors file of kohya's scripts, LyCORIS, diffusers or
            ComfyUI.

    Raises:
        CheckpointError: Such a file cannot be turned into an adapter without changing what it means.
    """
    name = os.fspath(model_id) if isinstance(model_id, (str, os.PathLike)) else model_id
    if not isinstance(name, str) or not os.path.isfile(name):
        yield model_id
        return
    weights = _weights(model)
    file = read_safetensors(name)
    converted = as_peft(file, weights)
    try:
        kind = PeftConfig._by_type[converted.config["peft_type"]]
        layers = {path: LayerInFile(tuple(weights[path]), parts) for path, parts in converted.layers.items()}
        converted.config |= kind.fields_of(layers)
    except ValueError as error:
        raise CheckpointError(name, str(error)) from None
    if converted.left_out:
        counted = " and ".join(f"{count} that begin with {prefix!r}" for prefix, count in converted.left_out.items())
        warnings.warn(
            f"model_id: of the modules in {name!r}, {counted} are not in this model and were left out; load the file "
            "on the model that has them too",
            stacklevel=4,
        )
    if not file.verified:
        logger.info("%s: unverified: the file carries no sha256 of its tensors (not written by peftk)", name)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(folder, converted.tensors, converted.config)
        try:
            yield folder
        except CheckpointError as error:
            # Nobody knows the folder, which is gone by now.
            if not error.file.startswith(folder):
                raise
            raise CheckpointError(name, *error.problems) from None


def _weights(model: nn.Module) -> dict[str, torch.Size]:
    found = {}
    for path, module in candidates(model).items():
        base = module.base_layer if isinstance(module, AdapterLayer) else module
        weight = getattr(base, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() > 1:
            found[path] = weight.shape
    return found


__all__ = ["peft_folder"]
