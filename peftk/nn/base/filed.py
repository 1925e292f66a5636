"""Adapters that are larger in memory than in their files."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Filed(nn.Module):
    """The part of `AdapterLayer` that says what a file has of an adapter: all of it, unless a method says otherwise."""

    def as_in_file(self, name: str, config: Any, path: str, tensors: dict[str, Tensor], prefix: str) -> None:
        """Change tensors of an adapter into those that a file has.

        Args:
            name: The adapter.
            config: The configuration of the file.
            path: The path of the layer in its model.
            tensors: Key to tensor; others may be among them.
            prefix: What the keys of this layer begin with.
        """

    def as_in_memory(self, name: str, config: Any, path: str, tensors: dict[str, Tensor], prefix: str) -> None:
        """Change tensors of a file into those that this adapter has; arguments as in `as_in_file`."""
