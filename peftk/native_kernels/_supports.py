"""What every C++ kernel on the CPU asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def supports_activations(x: Tensor) -> str | None:
    """Return None if C++ reads activations like x, else the reason why it does not."""
    if x.device.type != "cpu":
        return f"the C++ kernels take CPU tensors; got one on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernels take float32 and bfloat16; got {x.dtype}"
    return None
