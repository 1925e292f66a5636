"""Reading and writing adapter files, one dialect a file; docs of the rules are in reader.py and peft.py."""

from __future__ import annotations

from .peft import read_adapter, read_config, write_adapter
from .reader import CheckpointError, TensorFile, read_safetensors

__all__ = [
    "CheckpointError",
    "TensorFile",
    "read_adapter",
    "read_config",
    "read_safetensors",
    "write_adapter",
]
