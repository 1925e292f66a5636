"""The Cayley transform in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def skew(packed: Tensor, block_size: int) -> Tensor:
    """Unpack upper triangles into skew-symmetric matrices: (blocks, b, b)."""
    rows, cols = torch.triu_indices(block_size, block_size, 1, device=packed.device)
    upper = packed.new_zeros(packed.shape[0], block_size, block_size)
    upper[:, rows, cols] = packed
    return upper - upper.mT


def pack_skew_gradient(grad: Tensor) -> Tensor:
    """Return the gradient in the packed triangle from the gradient in the skew-symmetric matrix."""
    rows, cols = torch.triu_indices(grad.shape[-1], grad.shape[-1], 1, device=grad.device)
    return (grad - grad.mT)[:, rows, cols]


def _horner(s: Tensor, c: list[float]) -> list[Tensor]:
    """Return the stages of Horner's rule, ``P_k = P_(k+1) @ S + c_k I``, from P_(d-1) down to P_0."""
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    stages = [c[-1] * s + c[-2] * eye]
    for constant in c[-3::-1]:
        stages.append(torch.baddbmm(constant * eye, stages[-1], s))
    return stages


def cayley(packed: Tensor, block_size: int, polynomial: list[float]) -> Tensor:
    """See `peftk.functional.cayley`."""
    eye = torch.eye(block_size, dtype=packed.dtype, device=packed.device)
    s = skew(packed, block_size)
    if not polynomial:
        return torch.linalg.solve(eye + s, eye - s, left=False).contiguous()
    return _horner(s, polynomial)[-1] if len(polynomial) > 1 else eye.repeat(packed.shape[0], 1, 1)


def cayley_backward(grad: Tensor, packed: Tensor, blocks: Tensor, polynomial: list[float]) -> Tensor:
    """Return the gradient of `cayley` in the packed triangles."""
    if not polynomial:
        # With R = 2 inv(I + S) - I:  dR = -2 inv(I + S) dS inv(I + S)  and  inv(I + S) = (R + I) / 2.
        m = (blocks + torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)).mT
        return pack_skew_gradient(m @ grad @ m * -0.5)
    s = skew(packed, blocks.shape[-1])
    if len(polynomial) == 1:
        return torch.zeros_like(packed)
    total = torch.zeros_like(s)
    for stage in reversed(_horner(s, polynomial)[:-1]):
        total += stage.mT @ grad
        grad = grad @ s.mT
    return pack_skew_gradient(total + polynomial[-1] * grad)
