"""The Cayley transform in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def unpacked(skew: Tensor, block_size: int) -> Tensor:
    """Return skew-symmetric matrices, (blocks, b, b), from upper triangles or from square matrices."""
    if skew.dim() == 3:
        return (skew - skew.mT) * 0.5
    rows, cols = torch.triu_indices(block_size, block_size, 1, device=skew.device)
    upper = skew.new_zeros(skew.shape[0], block_size, block_size)
    upper[:, rows, cols] = skew
    return upper - upper.mT


def packed_gradient(grad: Tensor, skew: Tensor) -> Tensor:
    """Return the gradient in the triangles or square matrices `skew` from that in the skew-symmetric matrices."""
    if skew.dim() == 3:
        return (grad - grad.mT) * 0.5
    rows, cols = torch.triu_indices(grad.shape[-1], grad.shape[-1], 1, device=grad.device)
    return (grad - grad.mT)[:, rows, cols]


def _horner(s: Tensor, c: list[float]) -> list[Tensor]:
    """Return the stages of Horner's rule, ``P_k = P_(k+1) @ S + c_k I``, from P_(d-1) down to P_0."""
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    stages = [c[-1] * s + c[-2] * eye]
    for constant in c[-3::-1]:
        stages.append(torch.baddbmm(constant * eye, stages[-1], s))
    return stages


def cayley(skew: Tensor, block_size: int, polynomial: list[float]) -> Tensor:
    """See `peftk.functional.cayley`."""
    eye = torch.eye(block_size, dtype=skew.dtype, device=skew.device)
    s = unpacked(skew, block_size)
    if not polynomial:
        return torch.linalg.solve(eye + s, eye - s, left=False).contiguous()
    return _horner(s, polynomial)[-1] if len(polynomial) > 1 else eye.repeat(skew.shape[0], 1, 1)


def cayley_backward(grad: Tensor, skew: Tensor, blocks: Tensor, polynomial: list[float]) -> Tensor:
    """Return the gradient of `cayley` in the skew-symmetric matrices, as they are given."""
    if not polynomial:
        # With R = 2 inv(I + S) - I:  dR = -2 inv(I + S) dS inv(I + S)  and  inv(I + S) = (R + I) / 2.
        m = (blocks + torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)).mT
        return packed_gradient(m @ grad @ m * -0.5, skew)
    s = unpacked(skew, blocks.shape[-1])
    if len(polynomial) == 1:
        return torch.zeros_like(skew)
    total = torch.zeros_like(s)
    for stage in reversed(_horner(s, polynomial)[:-1]):
        total += stage.mT @ grad
        grad = grad @ s.mT
    return packed_gradient(total + polynomial[-1] * grad, skew)
