"""Float64 truths of the layers: dense formulas that share nothing with any arm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftk.testing.cases import block_diagonal, low_rank
from peftk.testing.compare import error

Values = dict[str, Tensor]


def skew(packed: Tensor, size: int) -> Tensor:
    """Unpack the upper triangles into skew-symmetric matrices."""
    upper = packed.new_zeros(len(packed), size, size)
    rows, columns = torch.triu_indices(size, size, 1, device=packed.device)
    block = torch.arange(len(packed), device=packed.device)[:, None]
    upper = upper.index_put((block, rows, columns), packed)
    return upper - upper.mT


def cayley(packed: Tensor, size: int, neumann: bool) -> Tensor:
    """Invert, or add up the powers that five terms mean."""
    s = skew(packed, size)
    eye = torch.eye(size, dtype=s.dtype, device=s.device)
    if not neumann:
        return (eye - s) @ torch.linalg.inv(eye + s)
    return eye + 2 * s + 2 * s @ s + 2 * s @ s @ s + s @ s @ s @ s


def lora(x: Tensor, weight: Tensor, bias: Tensor, scale: float, a: Tensor, b: Tensor) -> Tensor:
    """Multiply by the dense merged weight."""
    return low_rank.linear(x, weight, bias, a, b, scale)


def oft(x: Tensor, weight: Tensor, bias: Tensor, size: int, neumann: bool, packed: Tensor) -> Tensor:
    """Multiply by the dense rotation, then by the weight."""
    return block_diagonal.rotate_linear(x, weight, bias, cayley(packed, size, neumann))


def oft_of_output(x: Tensor, weight: Tensor, bias: Tensor, oft_blocks: Tensor) -> Tensor:
    """Multiply by the weight, then by the dense rotation: the layer of LyCORIS' diag-oft."""
    q = oft_blocks - oft_blocks.mT
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return block_diagonal.rotate(x @ weight.mT + bias, (eye + q) @ torch.linalg.inv(eye - q))


def dora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: float,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    detached: bool = True,
) -> Tensor:
    """Multiply by the merged weight whose rows have the lengths `magnitude`; no gradient goes through the norm."""
    merged = weight + scale * b @ a
    norm = (merged.detach() if detached else merged).norm(dim=1)
    return x @ (merged * (magnitude / norm)[:, None]).mT + bias


def circulant(kernel: Tensor, forwards: bool = True) -> Tensor:
    """Write out the blocks ``D[p, q] = w[(q - p) mod b]`` side by side, or ``w[(q + p) mod b]``."""
    rows, columns, size = kernel.shape
    at = torch.arange(size, device=kernel.device)
    shift = at[None, :] - at[:, None] if forwards else at[None, :] + at[:, None]
    dense = kernel[:, :, shift % size]
    return dense.permute(0, 2, 1, 3).reshape(rows * size, columns * size)


def butterfly(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply by ``P_i blockdiag(blocks[i]) P_i^T`` for every stage, the last one first."""
    stages, count, size = blocks.shape[:3]
    for stage in range(stages - 1, -1, -1):
        halves = torch.arange(count * size, device=x.device).view(-1, 2 * 2**stage, size // 2)
        order = torch.cat((halves[:, 0::2], halves[:, 1::2]), 1).flatten()
        scattered = torch.empty_like(x).index_copy(-1, order, x)
        x = block_diagonal.rotate(scattered, blocks[stage])[..., order]
    return x


def boft(x: Tensor, weight: Tensor, bias: Tensor, factors: Tensor, scale: Tensor) -> Tensor:
    """Multiply by the butterfly, by the weight, and by the scale of every output."""
    skew = (factors - factors.mT) / 2
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return butterfly(x, (eye - skew) @ torch.linalg.inv(eye + skew)) @ (scale * weight).mT + bias


def boft_of_output(x: Tensor, weight: Tensor, bias: Tensor, oft_blocks: Tensor, rescale: Tensor) -> Tensor:
    """Multiply by the weight, then by the butterfly, its first factor first: the layer of LyCORIS' boft."""
    q = oft_blocks - oft_blocks.mT
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    blocks = (eye + q) @ torch.linalg.inv(eye - q)
    y = x @ weight.mT + bias
    stages, count, size = blocks.shape[:3]
    for stage in range(stages):
        halves = torch.arange(count * size, device=x.device).view(-1, 2, 2**stage * size // 2)
        order = halves.mT.flatten()
        turned = block_diagonal.rotate(y[..., order], blocks[stage].mT)
        y = torch.empty_like(turned).index_copy(-1, order, turned)
    return y * rescale[:, 0]


def differentiate(formula: Callable[..., Tensor], values: Values, grad: Tensor) -> Values:
    """Return the output and the gradient in every value, in float64, for an incoming gradient."""
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    y = formula(**exact)
    gradients = torch.autograd.grad(y, list(exact.values()), grad.double()) if exact else ()
    return {"output": y.detach(), **{f"d{name}": g for name, g in zip(exact, gradients, strict=True)}}


def errors(found: Values, truth: Values) -> dict[str, float]:
    """Return the relative error, in the Frobenius norm, of everything that the truth names."""
    return {name: error(found[name], exact).norm for name, exact in truth.items()}
