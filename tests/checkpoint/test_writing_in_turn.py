"""Files written with one tensor at a time in memory are those of the library that has them all."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import safetensors.torch
import torch

from peftk.checkpoint.reader import read_safetensors
from peftk.checkpoint.writer import write_in_turn


def test_files_written_one_tensor_at_a_time_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 5, dtype=torch.bfloat16),
        "a.weight": torch.randn(4, 3).mT,
        "steps": torch.tensor(7),
        "a.empty": torch.empty(0, 4, dtype=torch.float16),
        "wide": torch.randn(1, dtype=torch.float64),
        "mask": torch.tensor([True, False, True]),
        "n\u00e4me": torch.arange(5, dtype=torch.uint8),
    }
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    asked: list[str] = []

    def tensor_of(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    with (tmp_path / "x.safetensors").open("wb") as stream:
        write_in_turn(stream, layout, {"format": "pt"}, tensor_of)
    assert sorted(asked) == sorted(tensors)
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        found[name].dtype is tensor.dtype and torch.equal(found[name], tensor) for name, tensor in tensors.items()
    )
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert read_safetensors(tmp_path / "x.safetensors").tensors.keys() == tensors.keys()
    with io.BytesIO() as other, pytest.raises(ValueError, match=r"key 'steps': expected .*torch\.int32"):
        write_in_turn(other, {"steps": (torch.int32, torch.Size([]))}, None, tensors.__getitem__)
