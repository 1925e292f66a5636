"""Adapters and helpers that the tests of the checkpoint files share."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from peftk.checkpoint import read_adapter, read_config
from peftk.checkpoint._container import memory

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapter(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"base_model.model.fc.lora_A.weight": (4, 6), "base_model.model.fc.lora_B.weight": (5, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def raw(tensor: Tensor) -> bytes:
    return bytes(memory(tensor.detach().contiguous())) if tensor.numel() else b""


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and raw(left[name]) == raw(right[name])
        for name in left
    )


def assert_holds(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    assert read_config(folder) == config
    assert same(read_adapter(folder, shapes_of(tensors)), tensors)


def hidden(folder: Path) -> list[str]:
    return sorted(set(os.listdir(folder)) - {WEIGHTS, CONFIG})
