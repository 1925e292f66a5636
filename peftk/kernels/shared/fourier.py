"""The real Fourier transform of blocks as a product with a constant matrix, in planes that pad to whole vectors.

A block of b real numbers becomes h = ceil(b / 2) lanes of a real and an imaginary part, padded to ``lanes(b)``. Lane 0
holds the constant as its real part and, where b is even, the alternating sum as its imaginary part, so that an even
block needs exactly b numbers. Every other lane is a complex number.

The transform of activations nearly keeps magnitudes, so that float16 does not overflow. It would keep them exactly with
1 / sqrt(b) in every entry, whose rounding is the same in all terms of a sum; a power of two has none.

A matrix is made once for a block size, a dtype and a device, and kept: a CUDA graph reads it at the place where it was
when the graph was captured.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

LANES = 8
"""Lanes are padded to multiples of this: a vector of the C++ kernels."""


def lanes(block_size: int) -> int:
    """Return the number of lanes of a block, padding included."""
    return -(-((block_size + 1) // 2) // LANES) * LANES


@functools.cache
def transform(block_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the transform of activations, (b, 2 * lanes): ``x @ transform`` has a real and an imaginary plane."""
    cosine, sine = _waves(block_size)
    scale = factors(block_size, False)[1]
    return _planes([cosine * scale, sine * scale], dtype, device)


@functools.cache
def inverse(block_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the inverse of `transform`, transposed: (b, 2 * lanes) with ``transform @ inverse.mT = 1``."""
    cosine, sine = _waves(block_size)
    first, rest = factors(block_size, True)
    scale = cosine.new_full((cosine.shape[1],), rest)
    scale[0] = first
    return _planes([cosine * scale, sine * scale], dtype, device)


@functools.cache
def kernel_transform(block_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the transform of kernels, (b, 3 * lanes), which is not scaled.

    The planes of a spectrum (a, s, c) multiply a lane (re, im) to ``(a re + s im, c im - s re)``: c is a again, except
    in lane 0, whose two numbers are real and apart, so that s is zero there.
    """
    cosine, sine = _waves(block_size)
    third, second = cosine.clone(), sine.clone()
    third[:, 0], second[:, 0] = sine[:, 0], 0.0
    return _planes([cosine, second, third], dtype, device)


def factors(block_size: int, inverted: bool) -> tuple[float, float]:
    """Return what `transform`, or `inverse` if inverted, multiplies the waves of lane 0 with, and those of the rest."""
    power = 2.0 ** round(-math.log2(block_size) / 2)
    return (1 / (block_size * power), 2 / (block_size * power)) if inverted else (power, power)


@functools.cache
def waves(block_size: int) -> Tensor:
    """Return cosine and sine of ``2 pi k / b``, (b / 2, 2), for the fast transform of the C++ kernels."""
    angle = torch.arange(block_size // 2, dtype=torch.float64, device="cpu") * (2 * math.pi / block_size)
    return torch.stack((angle.cos(), angle.sin()), 1).float()


def _waves(block_size: int) -> tuple[Tensor, Tensor]:
    # Reduced before the division, so that large products lose no digits.
    steps = torch.outer(torch.arange(block_size, device="cpu"), torch.arange((block_size + 1) // 2, device="cpu"))
    angle = (steps % block_size).double() * (2 * math.pi / block_size)
    cosine, sine = angle.cos(), angle.sin()
    if block_size % 2 == 0:
        sine[:, 0] = 1.0
        sine[1::2, 0] = -1.0
    return cosine, sine


def _planes(planes: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    rows, columns = planes[0].shape
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"circular convolution: expected the transform of blocks of {rows} in {dtype} on {device} to be there when "
            "a CUDA graph is captured; got its first use, which copies from memory that the graph must not read. Run "
            "the layer once, forward and backward, before the capture"
        )
    padded = torch.zeros(rows, len(planes), lanes(rows), dtype=torch.float64, device="cpu")
    for i, plane in enumerate(planes):
        padded[:, i, :columns] = plane
    # Rounded before the copy, which waits until it is done: any stream may read the result.
    return padded.flatten(1).to(dtype).to(device)
