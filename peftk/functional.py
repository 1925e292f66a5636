"""The operators of peftk: differentiable functions on tensors, each with several backends."""

from .ops.block_diagonal import block_rotate, block_rotate_linear
from .ops.butterfly import butterfly_compose, butterfly_multiply, scale_channels
from .ops.cayley import cayley
from .ops.circulant import circulant_linear, circulant_weight, circular_conv, circular_conv_add
from .ops.dora import dora_compose, dora_norm
from .ops.grouped_low_rank import grouped_low_rank_add, grouped_low_rank_linear
from .ops.hadamard import hadamard_weight, khatri_rao
from .ops.kronecker import kronecker_add, kronecker_linear, kronecker_weight
from .ops.low_rank import low_rank_add, low_rank_linear

__all__ = [
    "block_rotate",
    "block_rotate_linear",
    "butterfly_compose",
    "butterfly_multiply",
    "cayley",
    "circulant_linear",
    "circulant_weight",
    "circular_conv",
    "circular_conv_add",
    "dora_compose",
    "dora_norm",
    "grouped_low_rank_add",
    "grouped_low_rank_linear",
    "hadamard_weight",
    "khatri_rao",
    "kronecker_add",
    "kronecker_linear",
    "kronecker_weight",
    "low_rank_add",
    "low_rank_linear",
    "scale_channels",
]
