"""Every operator family; importing this package defines the ``peftk::`` operators."""

from . import block_diagonal

__all__ = ["block_diagonal"]
