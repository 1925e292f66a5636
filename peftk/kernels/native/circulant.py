"""Circular convolution with C++ or CUDA between the spectra and for the dense matrix; products are torch's.

Which way a call takes is decided in `kernels/shared/circulant.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C  # noqa: F401 - importing it registers the operators of peftk_native
from ..shared.circulant import Paths, Transforms, operators
from ..shared.fourier import factors, waves
from ._bare import bare
from ._supports import device_reason, supports_activations
from .wide_product import wide_product

# Looked up once: the look-up of an operator by name costs as much as a small kernel.
_mix_planes = torch.ops.peftk_native.circulant_mix.default
_contract_planes = torch.ops.peftk_native.circulant_contract.default
_write_weight = torch.ops.peftk_native.circulant_weight.default
_gather = torch.ops.peftk_native.circulant_weight_backward.default
_fourier = torch.ops.peftk_native.fourier.default
_fourier_inverse = torch.ops.peftk_native.fourier_inverse.default

FAST = 120
"""What the fast transform of one number costs, in operations of a matrix product; measured on AVX2 from 128 to 1024."""


def _reason(x: Tensor) -> str | None:
    if not x.is_cuda:
        return supports_activations(x)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the CUDA kernels take float32, bfloat16 and float16; got {x.dtype}"
    return device_reason(x)


def _mix(spectrum: Tensor, planes: Tensor, adjoint: bool) -> Tensor:
    out_blocks, in_blocks, _, lanes = planes.shape
    out = spectrum.new_empty(spectrum.shape[0], (in_blocks if adjoint else out_blocks) * 2 * lanes)
    _mix_planes(spectrum, planes, adjoint, out)
    return out


def _contract(grad: Tensor, x: Tensor, lanes: int) -> Tensor:
    out_blocks, in_blocks = grad.shape[1] // (2 * lanes), x.shape[1] // (2 * lanes)
    out = x.new_empty(out_blocks, in_blocks, 3, lanes, dtype=torch.float32)
    _contract_planes(grad, x, out)
    return out


def _write(weight: Tensor | None, kernel: Tensor, scale: float, out: Tensor) -> None:
    _write_weight(out.new_empty(0) if weight is None else weight, kernel, scale, out)


class _FastTransforms(Transforms):
    """The transforms on a CPU: in C++ for float32 and blocks of a power of two, where that is faster than a product."""

    def _fast(self, x: Tensor, size: int) -> bool:
        return x.dtype is torch.float32 and not x.is_cuda and size & (size - 1) == 0 and super().cost(x, size) > FAST

    def cost(self, x: Tensor, size: int) -> int:
        """Return what transforming one number costs, in operations of a matrix product."""
        return FAST if self._fast(x, size) else super().cost(x, size)

    def spectrum(self, rows: Tensor, size: int, gradient: bool) -> Tensor:
        """Return the planes of rows: (rows, blocks * 2 * lanes)."""
        if not self._fast(rows, size):
            return super().spectrum(rows, size, gradient)
        out = torch.empty_like(rows)
        _fourier(rows, waves(size), *factors(size, gradient), out)
        return out

    def add_back_(self, out: Tensor, planes: Tensor, size: int, gradient: bool, scale: float, beta: float) -> Tensor:
        """Add what planes are the spectrum of onto rows, or overwrite them where beta is 0."""
        if not self._fast(out, size):
            return super().add_back_(out, planes, size, gradient, scale, beta)
        first, rest = factors(size, not gradient)
        _fourier_inverse(planes, waves(size), first * scale, rest * scale, beta != 0, out)
        return out


few = bare(torch.ops.peftk_native.circulant_few.default)
"""``few(x, weight, bias, kernel, scale, most)`` returns the output of `circulant_linear` for few rows, in one pass over
the weight and without a spectrum; None where operators have to run, as the functions of `few_rows` do.
"""

# The kernels that the registry looks for here by name; what a backend has of its own are the steps above.
globals().update(operators(Paths(_mix, _contract, _write, _gather, _FastTransforms(), wide_product), _reason))
