"""Products summed in float32 of operators that are composed here: on the matrix instructions of a CPU where it can."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.shared import wide
from ..runtime import registry, settings


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of two matrices in `wide` of their dtype, in C++ where "native" may run and nothing listens.

    Args:
        a: (rows, depth).
        b: (depth, columns), of its dtype.
    """
    if (
        a.is_cpu
        and type(a) is Tensor
        and settings.backend() in ("auto", "native")
        and not torch.compiler.is_compiling()
        and not registry.is_differentiable()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    ):
        module = registry.backend_module("native", "wide_product")
        if not isinstance(module, str):
            found: Tensor = module.wide_product(a, b)
            return found
    return wide.wide_product(a, b)
