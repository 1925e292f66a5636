"""Every operator family; importing this package defines the ``peftk::`` operators."""

from . import block_diagonal, butterfly, cayley, circulant, dora, grouped_low_rank, hadamard, kronecker, low_rank

__all__ = [
    "block_diagonal",
    "butterfly",
    "cayley",
    "circulant",
    "dora",
    "grouped_low_rank",
    "hadamard",
    "kronecker",
    "low_rank",
]
