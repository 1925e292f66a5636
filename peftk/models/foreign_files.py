"""Adapter files of other programs, loaded as if PEFT had written them."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from ..checkpoint.container import CheckpointError
from ..checkpoint.foreign import Converted, as_peft
from ..checkpoint.peft import write_adapter
from ..checkpoint.reader import read_safetensors
from ..nn.base.adapter_layer import AdapterLayer
from ..nn.lokr import factor_of
from .file_keys import PREFIX
from .targets import candidates


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
    converted = as_peft(read_safetensors(name), weights)
    if converted.config["peft_type"] == "LOKR":
        converted.config["decompose_factor"] = _factor(name, converted, weights)
    if converted.left_out:
        counted = " and ".join(f"{count} that begin with {prefix!r}" for prefix, count in converted.left_out.items())
        warnings.warn(
            f"model_id: of the modules in {name!r}, {counted} are not in this model and were left out; load the file "
            "on the model that has them too",
            stacklevel=4,
        )
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(folder, converted.tensors, converted.config)
        yield folder


def _factor(name: str, converted: Converted, weights: dict[str, torch.Size]) -> int:
    """Return the `decompose_factor` of a file, of which only the shapes of its tensors tell."""
    first: dict[str, dict[str, torch.Size]] = {}
    for key, tensor in converted.tensors.items():
        path, _, part = key.removeprefix(PREFIX).rpartition(".")
        first.setdefault(path, {})[part] = tensor.shape
    sizes = []
    for path, parts in first.items():
        left = parts.get("lokr_w1", parts.get("lokr_w1_a"))
        right = parts.get("lokr_w1", parts.get("lokr_w1_b"))
        if left is None or right is None or len(left) != 2 or len(right) != 2:
            raise CheckpointError(name, f"module {path!r}: lokr_w1: expected a matrix or two, got {parts}")
        sizes.append((tuple(weights[path]), left[0], right[1]))
    factor = factor_of(sizes)
    if factor is None:
        raise CheckpointError(name, "lokr_w1: the modules have sizes of no one decompose_factor, as LyCORIS makes them")
    return factor


def _weights(model: nn.Module) -> dict[str, torch.Size]:
    found = {}
    for path, module in candidates(model).items():
        base = module.base_layer if isinstance(module, AdapterLayer) else module
        weight = getattr(base, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() > 1:
            found[path] = weight.shape
    return found


__all__ = ["peft_folder"]
