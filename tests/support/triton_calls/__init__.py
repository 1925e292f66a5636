"""Full-size calls of the operators for the proofs of the Triton kernels, on tensors without values.

The module of a family's name has `calls()`, which yields an operator's name and its arguments, and `LAUNCHES`, the
kernels that the first of those calls of each operator launches. It may have `NARROW`, the accesses of a kernel that
need not be 128 bits wide, `ONLY`, the targets on which a kernel is launched if not on all, and `SPILLS`, a kernel and
target to the reason why its spills are accepted.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from peftk import ops

Call = tuple[str, tuple]
TOKENS, WIDTH = 8192, 4096
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Return a tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


MODULES = {family: importlib.import_module(f"{__name__}.{family}") for family in ops.__all__}
CALLS = {family: module.calls for family, module in MODULES.items()}


def of_all(trait: str) -> dict[Any, Any]:
    """Return what all families say together about their operators or kernels."""
    return {key: value for module in MODULES.values() for key, value in getattr(module, trait, {}).items()}
