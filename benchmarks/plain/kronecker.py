"""The Kronecker product in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def multiply(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Contract with the large factor, then with the small one."""
    half = linear(x.view(len(x), w1.shape[1], -1), w2)
    return torch.einsum("lm,tmk->tlk", w1, half).reshape(len(x), -1)


PLAIN = {
    "kronecker_add": lambda base, x, w1, w2, scale=1.0: base + scale * multiply(x, w1, w2),
    "kronecker_linear": lambda x, weight, bias, w1, w2, scale=1.0: (
        linear(x, weight, bias) + scale * multiply(x, w1, w2)
    ),
    "kronecker_weight": lambda weight, w1, w2, scale=1.0: weight + scale * torch.kron(w1, w2),
}
