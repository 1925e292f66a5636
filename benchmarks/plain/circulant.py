"""The circular convolution in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def convolve(x: Tensor, kernel: Tensor, scale: float = 1.0) -> Tensor:
    """Convolve in the frequencies of real transforms, in float32."""
    size = kernel.shape[-1]
    spectrum = torch.fft.rfft(x.float().view(len(x), -1, size))
    mixed = torch.einsum("tnf,mnf->tmf", spectrum, torch.fft.rfft(kernel.float()).conj())
    return (scale * torch.fft.irfft(mixed, n=size).reshape(len(x), -1)).to(x.dtype)


def dense(kernel: Tensor) -> Tensor:
    """Write out the dense matrix: the rows of a block are windows of its first row, repeated."""
    rows, columns, size = kernel.shape
    windows = torch.cat((kernel, kernel), -1).unfold(-1, size, 1)[..., 1:, :].flip(-2)
    return windows.permute(0, 2, 1, 3).reshape(rows * size, columns * size)


PLAIN = {
    "circular_conv": convolve,
    "circular_conv_add": lambda base, x, kernel, scale=1.0: base + convolve(x, kernel, scale),
    "circulant_linear": lambda x, weight, bias, kernel, scale=1.0: linear(x, weight, bias) + convolve(x, kernel, scale),
    "circulant_weight": lambda weight, kernel, scale=1.0: weight + scale * dense(kernel),
}
