"""Adapters and helpers that the tests of the checkpoint files share."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

from peftk.checkpoint import CheckpointError, TensorFile, read_adapter, read_config, read_safetensors
from peftk.checkpoint.container import memory

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


def container(header: object, payload: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + payload


def tensor(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def overwrite(file: Path, content: bytes) -> None:
    """Write `content` in place: truncating a file to nothing first costs milliseconds on some file systems."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        assert os.write(descriptor, content) == len(content)
        os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)


def attempt(file: Path, content: bytes) -> TensorFile | None:
    """The file if it is accepted; None if it is refused as it should be: by name, briefly, and nothing else raised."""
    overwrite(file, content)
    try:
        return read_safetensors(file)
    except CheckpointError as error:
        assert str(file) in str(error) and len(str(error)) < 5000
        return None


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")
