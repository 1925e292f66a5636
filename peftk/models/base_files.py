"""The files of a model of transformers or diffusers, and the model that they describe, without memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.container import DTYPES, CheckpointError, capped, parse_json, shown
from ..checkpoint.reader import header

__all__ = ["CONFIG", "Base", "empty_model", "read_base"]

CONFIG = "config.json"


@dataclass
class Base:
    """The files of a model.

    Attributes:
        folder: Where they are.
        config: The content of its configuration.
        shards: The name of each file to the keys that are read from it.
        index: The name of the file that lists them, if there is one.
        shapes: Key to shape.
        dtypes: Key to dtype.
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, list[str]]
    index: str | None
    shapes: dict[str, torch.Size] = field(repr=False)
    dtypes: dict[str, torch.dtype] = field(repr=False)


def read_base(folder: str | os.PathLike[str]) -> Base:
    """Read the configuration of a model and the headers of its files.

    Args:
        folder: A folder of transformers or diffusers, with config.json and one model in safetensors files.

    Raises:
        CheckpointError: A file is missing or damaged, or what it says is not true.
    """
    where = Path(folder)
    if not where.is_dir():
        raise CheckpointError(str(where), f"expected a folder with {CONFIG} and safetensors files")
    try:
        config = parse_json((where / CONFIG).read_bytes(), max_depth=64)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(where / CONFIG), f"expected the configuration of a model: {error}") from None
    indices = sorted(where.glob("*.safetensors.index.json"))
    files = sorted(where.glob("*.safetensors"))
    if len(indices) > 1 or (not indices and len(files) != 1):
        found = [path.name for path in (indices or files)]
        raise CheckpointError(str(where), f"expected one safetensors file, or one index of several; got {shown(found)}")
    wanted = _index(indices[0]) if indices else None
    names = sorted(set(wanted.values())) if wanted is not None else [files[0].name]
    base = Base(where, config, {}, indices[0].name if indices else None, {}, {})
    problems = []
    for name in names:
        if not (where / name).is_file():
            problems.append(f"{name}: missing, and {base.index} lists it")
            continue
        entries, _ = header(where / name)
        there = {entry.name: entry for entry in entries}
        keys = list(there) if wanted is None else [key for key, file in wanted.items() if file == name]
        problems += [f"key {shown(key)}: not in {name}, where {base.index} has it" for key in keys if key not in there]
        base.shards[name] = keys
        for key in keys:
            if key in there:
                base.shapes[key] = torch.Size(there[key].shape)
                base.dtypes[key] = DTYPES[there[key].code]
    if problems:
        raise CheckpointError(str(where), *capped(problems, "problems"))
    return base


def _index(path: Path) -> dict[str, str]:
    try:
        found = parse_json(path.read_bytes(), max_depth=8).get("weight_map")
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), str(error)) from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and name == os.path.basename(name) and name.endswith(".safetensors")
        for name in found.values()
    ):
        raise CheckpointError(str(path), "weight_map: expected the names of safetensors files in this folder")
    return found


def empty_model(base: Base) -> nn.Module:
    """Return the model that a configuration describes, whose parameters have shapes and dtypes but no memory.

    Raises:
        CheckpointError: Neither transformers nor diffusers has its class, or the library is not installed.
    """
    name, classes = base.config.get("_class_name"), base.config.get("architectures")
    library, parent = ("transformers", "PreTrainedModel") if name is None else ("diffusers", "ModelMixin")
    if name is None and isinstance(classes, list) and classes:
        name = classes[0]
    try:
        module = __import__(library)
        found = getattr(module, str(name))
        # A file chooses among models alone.
        if not (isinstance(found, type) and issubclass(found, getattr(module, parent))):
            raise TypeError(f"it is no {parent}")
        kind: Any = found
        with torch.device("meta"):
            if library == "diffusers":
                model = kind.from_config(base.config)
            else:
                model = kind(module.AutoConfig.from_pretrained(base.folder, trust_remote_code=False))
    except ImportError as error:
        raise CheckpointError(str(base.folder / CONFIG), f"needs {library}: {error}") from None
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            str(base.folder / CONFIG), f"expected a model of {library}, got {shown(name)}: {error}"
        ) from None
    floating = [dtype for dtype in base.dtypes.values() if dtype.is_floating_point]
    usual = max(set(floating), key=floating.count, default=torch.float32)
    shared: dict[int, nn.Parameter] = {}
    for part in list(model.modules()):
        for key, parameter in list(part._parameters.items()):
            if parameter is not None:
                dtype = usual if parameter.dtype.is_floating_point else parameter.dtype
                one = nn.Parameter(torch.zeros((), dtype=dtype).expand(parameter.shape), requires_grad=False)
                part._parameters[key] = shared.setdefault(id(parameter), one)
    return model.eval()
