"""The numbers of modules in files of other programs: alphas, which give scales, and constraints of rotations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .container import CheckpointError, shown
from .foreign_names import prefix_of
from .patterns import PATTERN, keys_of
from .reader import TensorFile

__all__ = ["METADATA", "alpha_of", "constraint_of", "is_number", "scale_of_whole", "written_alphas"]

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the configuration in the header of a file."""


def written_alphas(metadata: Mapping[str, str], file: TensorFile) -> Mapping[str, Any]:
    """Return the configuration that diffusers has written into a header, or nothing."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file.path, f"metadata {METADATA}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(file.path, f"metadata {METADATA}: expected an object, got {type(values).__name__}")
    return values


def alpha_of(name: str, rank: int, parts: Mapping[str, Tensor], written: Mapping[str, Any]) -> float:
    """Return the alpha of a module: its own, that of the header, or its rank, which makes the scale 1.

    Raises:
        ValueError: It is no finite number above 0.
    """
    tensor = parts.get("alpha", parts.get("lora_alpha"))
    if tensor is not None:
        if "alpha" in parts and "lora_alpha" in parts:
            raise ValueError("alpha and lora_alpha: expected one of them")
        if tensor.numel() != 1:
            raise ValueError(f"alpha: expected one number, got shape {tuple(tensor.shape)}")
        alpha = float(tensor)
    else:
        prefix, rest = prefix_of(name)
        values = {key.removeprefix(prefix): value for key, value in written.items() if key.startswith(prefix)}
        usual = values.get("lora_alpha", values.get("alpha", rank))
        alpha = _by_pattern("alpha", values.get("alpha_pattern"), rest or name, usual)
        if values.get("use_rslora"):
            alpha *= rank**0.5
    return _above_zero("alpha", alpha)


def scale_of_whole(name: str, written: Mapping[str, Any]) -> float:
    """Return the scale of LoKr with two whole factors: 1, but where a configuration of PEFT is in the header."""
    prefix, rest = prefix_of(name)
    values = {key.removeprefix(prefix): value for key, value in written.items() if key.startswith(prefix)}
    if "alpha" not in values or "r" not in values:
        return 1.0
    alpha, rank = (
        _above_zero(what, _by_pattern(what, values.get(f"{what}_pattern"), rest or name, values[field]))
        for what, field in (("alpha", "alpha"), ("rank", "r"))
    )
    return alpha / rank


def _by_pattern(what: str, patterns: Any, path: str, default: Any) -> float:
    """Return a number of a module by the rule of PEFT, whose patterns diffusers writes into headers."""
    if patterns is not None and not isinstance(patterns, dict):
        raise ValueError(f"{what}_pattern: expected an object in the metadata, got {shown(patterns)}")
    if patterns:
        try:
            found = keys_of(PATTERN, tuple(patterns)).first(path)
        except ValueError as error:
            raise ValueError(f"{what}_pattern: key {error}") from None
        default = patterns.get(path if found is None else found, default)
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        raise ValueError(f"{what}: expected a number in the metadata, got {shown(default)}")
    return float(default)


def _above_zero(what: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{what}: expected a finite number above 0, got {value:g}")
    return value


def is_number(key: str, dtype: torch.dtype) -> bool:
    """Whether a tensor may have a dtype: factors are floating, and LyCORIS writes some alphas as integers."""
    alpha = key.rpartition(".")[2] in ("alpha", "lora_alpha")
    return dtype.is_floating_point or (alpha and not dtype.is_complex and dtype is not torch.bool)


def constraint_of(parts: Mapping[str, Tensor]) -> float:
    """Return the constraint of a rotation, which is written as its alpha; 0 for none."""
    alpha = parts.get("alpha")
    if alpha is None:
        return 0.0
    if alpha.numel() != 1 or not 0 <= float(alpha) < 1e6:
        raise ValueError(f"alpha: expected one number from 0, got {shown(alpha.flatten()[:4].tolist())}")
    return float(alpha)
