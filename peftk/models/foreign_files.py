"""Adapter files of other programs, loaded as if PEFT had written them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from ..checkpoint.adapted import OUTPUT
from ..checkpoint.container import CheckpointError
from ..checkpoint.foreign import as_peft
from ..checkpoint.peft import write_adapter
from ..checkpoint.reader import TensorFile, read_safetensors
from ..checkpoint.recognise import DIALECTS, recognise
from ..methods._base_layer import kind_of
from ..nn import PeftConfig
from ..nn.base.adapter_layer import AdapterLayer
from ..nn.base.config import LayerInFile, check_choice
from .targets import candidates

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def peft_folder(
    model: nn.Module, model_id: str | os.PathLike[str], dialect: str = "auto"
) -> Iterator[str | os.PathLike[str]]:
    """Give what `model_id` names: itself, or for the file of another program a folder as PEFT writes it.

    Args:
        model: The base model, or one with adapters, whose modules the file names.
        model_id: A folder, the name of a repository, or a safetensors file of kohya's scripts, LyCORIS, diffusers or
            ComfyUI.
        dialect: A name of `DIALECTS` that it must have; "auto" for any.

    Raises:
        ValueError: `dialect` is no such name, or not that of a folder.
        CheckpointError: Such a file cannot be turned into an adapter without changing what it means.
    """
    name = os.fspath(model_id) if isinstance(model_id, (str, os.PathLike)) else model_id
    check_choice("dialect", dialect, ("auto", *DIALECTS))
    if not isinstance(name, str) or not os.path.isfile(name):
        if dialect not in ("auto", "peft"):
            raise ValueError(
                f"dialect: expected 'auto' or 'peft' for what is no file, got {dialect!r} for {name!r}; pass the file"
            )
        yield model_id
        return
    weights = _weights(model)
    file = read_safetensors(name)
    _check_dialect(file, dialect)
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
        except (TypeError, ValueError) as error:
            if folder not in str(error):
                raise
            raise CheckpointError(name, re.sub(re.escape(folder) + r"[^\s:]*:? ?", "", str(error))) from None


def _check_dialect(file: TensorFile, dialect: str) -> None:
    if dialect == "auto":
        return
    found = recognise({key: tensor.shape for key, tensor in file.items()}, file.metadata)
    # LyCORIS has kohya's names, and both of the others write bare ones.
    same = [{"kohya", "LyCORIS"}, {"diffusers", "bare names"}, {"ComfyUI", "bare names"}]
    wanted = DIALECTS[dialect]
    if found.dialect != wanted and not any({found.dialect, wanted} <= names for names in same):
        raise CheckpointError(file.path, f"dialect: expected {wanted}, as asked for, and it has {found}")
    if wanted == "ComfyUI" and any(one.method == OUTPUT for one in found.modules.values()):
        raise CheckpointError(
            file.path, f"has {found}; ComfyUI bounds rotations by another constraint than LyCORIS, which is read here"
        )


def _weights(model: nn.Module) -> dict[str, torch.Size]:
    found = {}
    for path, module in candidates(model).items():
        base = module.base_layer if isinstance(module, AdapterLayer) else module
        weight = getattr(base, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() > 1:
            # As (out, in), which transformers' Conv1D has the other way round.
            found[path] = weight.shape[::-1] if kind_of(base) == "Conv1D" else weight.shape
    return found


__all__ = ["peft_folder"]
