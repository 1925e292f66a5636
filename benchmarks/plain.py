"""Every public operator as one writes it in plain PyTorch: what eager mode and torch.compile are timed with.

Activations are (tokens, features). Arguments have the names and defaults of the public functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply by a block-diagonal matrix, as one batched product."""
    rows = x.view(len(x), -1, blocks.shape[-1]).transpose(0, 1)
    return torch.bmm(rows, blocks).transpose(0, 1).reshape(x.shape)


def cayley(skew: Tensor, block_size: int, neumann_terms: int | None = None) -> Tensor:
    """Unpack, and solve, or add up the powers that five terms mean."""
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=skew.device)
    upper = skew.new_zeros(len(skew), block_size, block_size)
    upper[:, rows, columns] = skew
    s = upper - upper.mT
    eye = torch.eye(block_size, dtype=s.dtype, device=s.device)
    if neumann_terms is None:
        return torch.linalg.solve(eye + s, eye - s, left=False)
    s2 = s @ s
    return eye + 2 * s + 2 * s2 + 2 * s2 @ s + s2 @ s2


def butterfly(x: Tensor, factors: Tensor) -> Tensor:
    """Rotate by one stage after the other, the last one first."""
    half = factors.shape[-1] // 2
    for stage in range(len(factors) - 1, -1, -1):
        # Of every chunk of 2^(stage + 1) half blocks, the first half meets the second: they are interleaved.
        halves = x.view(len(x), -1, 2, 2**stage, half).transpose(2, 3)
        x = rotate(halves.reshape(x.shape), factors[stage])
        x = x.view(len(x), -1, 2**stage, 2, half).transpose(2, 3).reshape(x.shape)
    return x


def compose(factors: Tensor) -> Tensor:
    """Let every group of features that the stages join rotate an identity of its own, all of them at once."""
    stages, count, size, _ = factors.shape
    group = size << (stages - 1)
    eye = torch.eye(group, dtype=factors.dtype, device=factors.device)
    return butterfly(eye.repeat(1, count * size // group), factors).view(group, -1, group).transpose(0, 1)


def convolve(x: Tensor, kernel: Tensor, scale: float = 1.0) -> Tensor:
    """Convolve in the frequencies of real transforms, in float32."""
    size = kernel.shape[-1]
    spectrum = torch.fft.rfft(x.float().view(len(x), -1, size))
    mixed = torch.einsum("tnf,mnf->tmf", spectrum, torch.fft.rfft(kernel.float()).conj())
    return (scale * torch.fft.irfft(mixed, n=size).reshape(len(x), -1)).to(x.dtype)


def circulant(kernel: Tensor) -> Tensor:
    """Write out the dense matrix: the rows of a block are windows of its first row, repeated."""
    rows, columns, size = kernel.shape
    windows = torch.cat((kernel, kernel), -1).unfold(-1, size, 1)[..., 1:, :].flip(-2)
    return windows.permute(0, 2, 1, 3).reshape(rows * size, columns * size)


def khatri_rao(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply every row of one factor with every row of the other."""
    return (w1_b[:, None] * w2_b[None]).flatten(0, 1), (w1_a[:, :, None] * w2_a[:, None]).flatten(1)


def kronecker(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Contract with the large factor, then with the small one."""
    half = linear(x.view(len(x), w1.shape[1], -1), w2)
    return torch.einsum("lm,tmk->tlk", w1, half).reshape(len(x), -1)


def norms(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Form the adapted weight, and take the norms of its rows."""
    return (weight.float() + scale * (b @ a)).norm(dim=1)


def rescaled(base: Tensor, x: Tensor, a: Tensor, b: Tensor, gain: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """Scale what is beside the bias."""
    return (bias + gain * (base - bias + low_rank(x, a, b, scale))).to(base.dtype)


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Multiply by the two factors, and by the scale."""
    return scale * linear(linear(x, a), b)


PLAIN: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "block_rotate": rotate,
    "block_rotate_linear": lambda x, weight, bias, blocks: linear(rotate(x, blocks), weight, bias),
    "butterfly_compose": compose,
    "butterfly_multiply": butterfly,
    "cayley": cayley,
    "circular_conv": convolve,
    "circular_conv_add": lambda base, x, kernel, scale=1.0: base + convolve(x, kernel, scale),
    "circulant_linear": lambda x, weight, bias, kernel, scale=1.0: linear(x, weight, bias) + convolve(x, kernel, scale),
    "circulant_weight": lambda weight, kernel, scale=1.0: weight + scale * circulant(kernel),
    "dora_compose": rescaled,
    "dora_norm": norms,
    "hadamard_weight": lambda weight, w1_a, w1_b, w2_a, w2_b, scale=1.0: weight + scale * (w1_a @ w1_b) * (w2_a @ w2_b),
    "khatri_rao": khatri_rao,
    "kronecker_add": lambda base, x, w1, w2, scale=1.0: base + scale * kronecker(x, w1, w2),
    "kronecker_linear": lambda x, weight, bias, w1, w2, scale=1.0: (
        linear(x, weight, bias) + scale * kronecker(x, w1, w2)
    ),
    "kronecker_weight": lambda weight, w1, w2, scale=1.0: weight + scale * torch.kron(w1, w2),
    "low_rank_add": lambda base, x, a, b, scale=1.0: base + low_rank(x, a, b, scale),
    "low_rank_linear": lambda x, weight, bias, a, b, scale=1.0: linear(x, weight, bias) + low_rank(x, a, b, scale),
    "scale_channels": lambda x, scale, bias: bias + scale * (x - bias),
}
"""Public operator to its formula."""
