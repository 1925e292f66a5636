"""The operators of peftk: differentiable functions on tensors, each with several backends."""

from .ops.block_diagonal import block_rotate, block_rotate_linear
from .ops.cayley import cayley
from .ops.low_rank import low_rank_add, low_rank_linear

__all__ = ["block_rotate", "block_rotate_linear", "cayley", "low_rank_add", "low_rank_linear"]
