"""Products of half-precision matrices summed in float32, on a CPU's matrix instructions where it has them.

The rule: bfloat16 operands, or one of them in float32, and sums of `LEAST` terms or more, on a CPU with AMX.
Everywhere else, and in float16, both are widened and torch multiplies them in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ..shared import wide

# Looked up once: the look-up of an operator by name costs as much as a small kernel.
_product = torch.ops.peftk_native.wide_product.default

INSTRUCTIONS = _C.has_bfloat16_tiles()
"""Whether products with a bfloat16 operand run on matrix instructions here."""

LEAST = 64
"""Terms of a sum from which on they pay for laying the operands out in tiles; measured on LoRA and LoHa layers."""


def narrow(rows: Tensor) -> bool:
    """Say whether sums over rows are made of them as they are: else they are widened, once for several products."""
    return INSTRUCTIONS and rows.dtype is torch.bfloat16 and rows.shape[0] >= LEAST


def _dense(t: Tensor) -> Tensor:
    return t if 1 in t.stride() else t.contiguous()


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of two matrices, in `wide` of their dtype.

    Args:
        a: (rows, depth), half precision or wider, in any layout.
        b: (depth, columns); beside a bfloat16 operand it may be float32, and so may a, which is then used exactly.
    """
    of_a, of_b = a.dtype, b.dtype
    if not (
        INSTRUCTIONS
        and (of_a is torch.bfloat16 or of_b is torch.bfloat16)
        and (of_a is of_b or of_a is torch.float32 or of_b is torch.float32)
        and a.is_cpu
        and a.shape[1] >= LEAST
    ):
        return wide.wide_product(a, b)
    out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    _product(_dense(a), _dense(b), True, out)
    return out
