"""PiSSA and OLoRA adapters written as ordinary LoRA adapters of twice the rank: what they have learned."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..nn import LoraConfig, PeftConfig
from ..nn.lora.start import Start, is_random, starts_inside
from .adapters import Tuner
from .file_keys import PREFIX
from .plan import Plan

_FIRST, _SECOND = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")


def start_to_subtract(tuner: Tuner, plan: Plan, folder: str | os.PathLike[str] | None) -> dict[str, Tensor] | None:
    """Return the factors, by file key, that an adapter is to be written without; None for an adapter as it is.

    Args:
        tuner: The model.
        plan: The adapter.
        folder: Where the adapter was saved before it was trained; None for no conversion, unless its start cannot be
            found again.

    Raises:
        ValueError: The adapter cannot be converted, or the folder does not hold it.
    """
    config = plan.config
    how = getattr(config, "init_lora_weights", True)
    if folder is None and not is_random(how):
        return None
    if type(config) is not LoraConfig or config.use_dora:
        raise ValueError(
            f"path_initial_model_for_weight_conversion: adapter {plan.name!r} is {config._kind}"
            f"{' with DoRA' if isinstance(config, LoraConfig) else ''}; only LoRA adapters can be converted"
        )
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "path_initial_model_for_weight_conversion: use_rslora with rank_pattern or alpha_pattern has a scale for "
            "each module that no configuration of twice the rank gives"
        )
    if folder is None:
        warnings.warn(
            f"save_pretrained: the start of adapter {plan.name!r} (init_lora_weights={how!r}) is random and found by "
            "nobody again, so that it is written as an ordinary LoRA adapter of twice the rank",
            stacklevel=5,
        )
    if starts_inside(how):
        return _in_memory(plan)
    assert folder is not None
    return _in_folder(tuner, plan, folder)


def _in_memory(plan: Plan) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, adapter in plan.adapters.items():
        start = adapter.parts.get("lora_start")
        if isinstance(start, Start):
            found[f"{PREFIX}{path}.lora_A.weight"], found[f"{PREFIX}{path}.lora_B.weight"] = start.a, start.b
    return found


def _in_folder(tuner: Tuner, plan: Plan, folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    from ..checkpoint import peft as files

    shapes = {key: tensor.shape for key, tensor in tuner._file_tensors(plan).items()}
    return files.read_adapter(os.fspath(folder), shapes)


def converted_tensors(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file with ``[A; A0]`` and ``[B, -B0]`` in place of A and B."""
    found = dict(tensors)
    for key, tensor in tensors.items():
        part = key.removesuffix(".weight").rpartition(".")[2]
        if key in start and part in (*_FIRST, *_SECOND):
            first = start[key].detach().to(tensor)
            found[key] = torch.cat([tensor, first] if part in _FIRST else [tensor, -first], 0 if part in _FIRST else 1)
    return found


def converted_values(config: PeftConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the configuration file with twice the rank and the same scale."""
    assert isinstance(config, LoraConfig)
    factor = 2**0.5 if config.use_rslora else 2
    alpha = {key: factor * value for key, value in (values["alpha_pattern"] or {}).items()}
    rank = {key: 2 * value for key, value in (values["rank_pattern"] or {}).items()}
    whole = {"r": 2 * values["r"], "lora_alpha": factor * values["lora_alpha"], "init_lora_weights": True}
    return values | whole | {"rank_pattern": rank, "alpha_pattern": alpha}


__all__ = ["converted_tensors", "converted_values", "start_to_subtract"]
