"""Adapter files of any program, read into the form that all share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import foreign, foreign_names, foreign_numbers
from ..checkpoint.adapted import (
    MAGNITUDES,
    METHODS,
    OUTPUT,
    TYPES,
    WHOLE,
    Adapted,
    common_name,
    component_of,
    weight_shape,
)
from ..checkpoint.container import CheckpointError, capped, parse_json, shown
from ..checkpoint.peft import CONFIG_NAME, MAX_CONFIG_DEPTH, WEIGHTS_NAME, read_config
from ..checkpoint.reader import TensorFile, header_shapes, read_safetensors
from ..checkpoint.recognise import Description, Found, recognise
from ..nn import PeftConfig
from ..nn.lora.start import starts_inside

__all__ = ["PROVENANCE", "Source", "model_weights", "read_source"]

PROVENANCE = "peftk_source"
"""Where the metadata of a file says what it was made from."""

_PEFT = "base_model.model."
_TYPES = tuple(TYPES.values())
_REFUSED = ("target_parameters", "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "lora_bias")


@dataclass
class Source:
    """An adapter as it was read.

    Attributes:
        path: The file or folder.
        dialect: A value of `DIALECTS`, or "bare names".
        modules: What it adapts.
        others: Keys that belong to no module, such as those of a classifier.
        file: Its tensors and metadata.
        config: Its configuration, of PEFT.
    """

    path: str
    dialect: str
    modules: list[Adapted]
    others: list[str]
    file: TensorFile = field(repr=False)
    config: dict[str, Any] | None = None

    @property
    def origin(self) -> dict[str, Any] | None:
        """What the file says it was made from, if nobody has changed it since, or None."""
        text = self.file.metadata.get(PROVENANCE)
        if text is None or not self.file.verified:
            return None
        try:
            found = parse_json(text.encode(), max_depth=MAX_CONFIG_DEPTH)
        except ValueError as error:
            raise CheckpointError(self.file.path, f"metadata {PROVENANCE}: {error}") from None
        return found if isinstance(found, dict) else None


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read an adapter of any dialect.

    Args:
        path: A safetensors file, or a folder of PEFT.

    Raises:
        CheckpointError: It is damaged, of no known dialect or of several, or of a method that others do not have;
            every reason is named.
    """
    where = Path(path)
    folder = where.is_dir()
    config = read_config(where) if folder else None
    file = read_safetensors(where / WEIGHTS_NAME if folder else where)
    found = recognise({key: tensor.shape for key, tensor in file.items()}, file.metadata)
    of_peft = found.dialect == "PEFT"
    problems = [problem for problem in found.problems() if not problem.endswith(": of no adapter")]
    if found.dialect is None:
        problems.append("expected an adapter of PEFT, kohya's scripts, LyCORIS, diffusers or ComfyUI")
    if of_peft and not folder:
        problems.append(f"expected the folder with {CONFIG_NAME}, which has the alpha, instead of the file alone")
    if folder and not of_peft:
        problems.append("expected keys of PEFT in a folder; pass the file to read it as it is")
    problems += [
        f"method {method}: has no counterpart in other programs" for method in found.methods if method not in METHODS
    ]
    problems += [
        f"key {shown(key)}: dtype expected floating, got {tensor.dtype}"
        for key, tensor in file.items()
        if key not in found.others and not foreign_numbers.is_number(key, tensor.dtype)
    ]
    if not problems and config is not None:
        problems += _config_problems(config)
    if problems:
        raise CheckpointError(str(where), f"has {found}", *capped(problems, "problems"))
    modules = _modules(found, file, _of_peft(config) if config is not None else _of_others(file))
    return Source(str(where), str(found.dialect), modules, found.others, file, config)


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    problems = []
    if kind not in _TYPES:
        problems.append(f"{CONFIG_NAME}: peft_type: expected one of {', '.join(_TYPES)}, got {shown(kind)}")
    problems += [
        f"{CONFIG_NAME}: {name}: expected to be unset, got {shown(config[name])}, which no other program has"
        for name in _REFUSED
        if config.get(name)
    ]
    if problems:
        return problems
    try:
        made = PeftConfig.from_dict(dict(config))
    except (NotImplementedError, TypeError, ValueError) as error:
        # What it refuses is one of the reasons that are named together.
        return [f"{CONFIG_NAME}: {error}"]
    how = getattr(made, "init_lora_weights", True)
    if starts_inside(how):
        problems.append(
            f"{CONFIG_NAME}: init_lora_weights={how!r}: the factors start as a part of the base weight, which no other "
            "program takes off it; load the adapter on its model, and save it with "
            "path_initial_model_for_weight_conversion as an ordinary one of twice the rank"
        )
    return problems


Number = Callable[[str, int | None, Mapping[str, Tensor]], float]
"""Return the alpha of a module by its name, rank and tensors."""


def _of_others(file: TensorFile) -> Number:
    written = foreign_numbers.written_alphas(file.metadata, file)

    def alpha(name: str, rank: int | None, parts: Mapping[str, Tensor]) -> float:
        if "oft_blocks" in parts:
            return foreign_numbers.constraint_of(parts)
        if rank is None:
            return foreign_numbers.scale_of_whole(name, written)
        return foreign_numbers.alpha_of(name, rank, parts, written)

    return alpha


def _of_peft(values: Mapping[str, Any]) -> Number:
    config = PeftConfig.from_dict(dict(values))
    if config.peft_type == TYPES[OUTPUT]:
        return lambda name, rank, parts: config.constraint

    def alpha(name: str, rank: int | None, parts: Mapping[str, Tensor]) -> float:
        path = name.removeprefix(_PEFT)
        usual = config.lora_alpha if config.peft_type == "LORA" else config.alpha
        found = float(config._of_module(config.alpha_pattern, path, usual))
        if rank is None:
            # PEFT multiplies by alpha / r also where nothing is factorised.
            return found / config._of_module(config.rank_pattern, path, config.r)
        return found * rank**0.5 if getattr(config, "use_rslora", False) else found

    return alpha


def _modules(found: Description, file: TensorFile, number: Number) -> list[Adapted]:
    modules, problems = [], []
    for name, one in found.modules.items():
        try:
            modules.append(_module(name, one, file, number))
        except ValueError as error:
            problems.append(f"module {shown(name)}: {error}")
    if problems:
        raise CheckpointError(file.path, f"has {found}", *capped(problems, "problems"))
    return modules


def _module(name: str, found: Found, file: TensorFile, number: Number) -> Adapted:
    prefix, rest = foreign_names.prefix_of(name)
    if found.method == WHOLE:
        return _whole(name, component_of(prefix), rest or name, found, file)
    parts: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    for part in found.parts:
        common = common_name(part)
        if common is None:
            raise ValueError(f"{part}: no other program has it")
        if common in keys:
            raise ValueError(f"{part}: expected once, and is there as {keys[common]!r} too")
        keys[common] = f"{name}.{part}"
        if common != "alpha":
            parts[common] = file[f"{name}.{part}"]
    module = Adapted(name, component_of(prefix), rest or name, found.method or "", parts, None, keys)
    rank, shape = module.rank, weight_shape(module)
    value = number(name, rank, {part: file[f"{name}.{part}"] for part in found.parts})
    if rank is not None or module.method == OUTPUT:
        module.alpha = value
    elif value != 1:
        parts["lokr_w1"] = (parts["lokr_w1"].double() * value).to(parts["lokr_w1"].dtype)
        module.notes.append(f"lokr_w1: multiplied by {value:g}, since others scale whole factors by 1")
    if MAGNITUDES in parts:
        _check_magnitudes(parts, shape, keys[MAGNITUDES].endswith(f".{MAGNITUDES}"))
    return module


def _whole(name: str, component: str, path: str, found: Found, file: TensorFile) -> Adapted:
    parts = foreign.as_kronecker({part: file[f"{name}.{part}"] for part in found.parts})
    if others := found.parts.keys() - {"diff", "diff_b", "alpha"}:
        raise ValueError(f"{', '.join(sorted(others))}: expected none beside diff")
    keys = {"lokr_w2": f"{name}.diff"} | ({"alpha": f"{name}.alpha"} if "alpha" in found.parts else {})
    module = Adapted(name, component, path, "LoKr", parts, None, keys)
    module.unused = {f"{name}.diff_b": "zeros, which change no bias"} if "diff_b" in found.parts else {}
    weight_shape(module)
    return module


def _check_magnitudes(parts: dict[str, Tensor], shape: torch.Size, has_axis: bool) -> None:
    """Give magnitudes the shape that all but PEFT write: (out, 1, ...) for outputs, (1, in, 1, ...) for inputs."""
    scale = parts[MAGNITUDES]
    longest, places = max(scale.shape, default=1), [1] * (max(scale.dim(), len(shape)) - 2)
    # Names of PEFT are those of outputs, but for two dimensions, which this package alone writes.
    if has_axis:
        of_inputs = scale.dim() > 1 and not scale.shape[0] == scale.numel() == shape[0]
    else:
        of_inputs = scale.dim() == 2 and len(scale) == 1
    # What reads one channel may be a kernel, of which the factors of some methods do not say how large it is.
    fits = shape[1] % longest == 0 if of_inputs else shape[0] == longest
    if scale.numel() != longest or not fits:
        raise ValueError(
            f"{MAGNITUDES}: expected one number for each of the {shape[0]} outputs or the {shape[1]} inputs, got shape "
            f"{tuple(scale.shape)}"
        )
    parts[MAGNITUDES] = scale.reshape(1, -1, *places) if of_inputs else scale.reshape(-1, 1, *places)


def model_weights(path: str | os.PathLike[str]) -> dict[str, torch.Size]:
    """Return the path and shape of every weight of a model by the headers of its files.

    Args:
        path: A safetensors file, or a folder with such files, of one model.

    Raises:
        CheckpointError: There are none, or one is damaged.
    """
    where = Path(path)
    files = sorted(where.glob("*.safetensors")) if where.is_dir() else [where]
    if not files:
        raise CheckpointError(str(where), "expected safetensors files of a model, got a folder without")
    found: dict[str, torch.Size] = {}
    for file in files:
        for key, shape in header_shapes(file).items():
            name, _, last = key.rpartition(".")
            if last == "weight" and len(shape) > 1:
                found[name] = shape
    return found
