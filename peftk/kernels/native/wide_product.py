"""Products of half-precision matrices summed in float32, on a CPU's matrix instructions where it has them.

The rule: bfloat16 operands, or one of them in float32, on a CPU with AMX. Everywhere else, and in float16, both are
widened and torch multiplies them in float32. On a CPU without AMX a product of bfloat16 numbers in vectors is not
faster by enough to pay for laying them out.
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


def narrow(dtype: torch.dtype) -> bool:
    """Say whether operands of a dtype are multiplied as they are: others are widened, once for several products."""
    return INSTRUCTIONS and dtype is torch.bfloat16


def _dense(t: Tensor) -> Tensor:
    return t if 1 in t.stride() else t.contiguous()


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of two matrices, in `wide` of their dtype.

    Args:
        a: (rows, depth), half precision or wider, in any layout.
        b: (depth, columns); with a bfloat16 operand the other one may be float32, which is used exactly.
    """
    dtypes = {a.dtype, b.dtype}
    if not INSTRUCTIONS or torch.bfloat16 not in dtypes or not dtypes <= {torch.bfloat16, torch.float32} or a.is_cuda:
        return wide.wide_product(a, b)
    out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    _product(_dense(a), _dense(b), True, out)
    return out
