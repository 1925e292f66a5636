"""The ways that lead to a circular convolution, for the backends that have kernels for their small steps.

- By frequencies: transform the blocks of the activations, mix them, transform back. The transforms are products with a
  constant matrix in the dtype of the activations, and so are the spectra.
- Dense: write the matrix of circulant blocks in the dtype of the activations and multiply by it.
- Merged: write that matrix onto a copy of the frozen weight, so that no product is added at all. For float32 alone: in
  half precision a small adapter would be lost in the rounded weight.

What costs least is decided from shapes and dtype alone, so that equal calls add in equal order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._fourier import inverse, kernel_transform, lanes, transform

WRITE, WRITE_FRESH = 40, 220
"""What writing an element of a matrix costs, in operations of a matrix product: where memory is used again, and where
that of every matrix is fresh from the operating system."""

REUSED = 2**25
"""Bytes up to which memory is used again: the largest threshold of glibc's malloc."""

LANE = 24
"""What mixing one lane of one pair of blocks costs: eight operations, at a third of the speed of a matrix product."""


def _costs(rows: int, kernel: Tensor) -> tuple[float, float, float]:
    """Return the cost of one row by frequencies, with a dense matrix, and of writing one, as its share."""
    out_blocks, in_blocks, size = kernel.shape
    width = lanes(size)
    elements = out_blocks * in_blocks * size * size
    by_frequencies = 4 * width * size * (out_blocks + in_blocks) + LANE * width * out_blocks * in_blocks
    fresh = not kernel.is_cuda and 4 * elements > REUSED
    written = (WRITE_FRESH if fresh else WRITE) * elements / max(rows, 1)
    return by_frequencies, 2 * elements + written, written


def dense_pays(rows: int, kernel: Tensor) -> bool:
    """Say whether a product with the dense matrix costs less than the way through the frequencies."""
    by_frequencies, dense, _ = _costs(rows, kernel)
    return dense < by_frequencies


def merged_pays(rows: int, kernel: Tensor, dtype: torch.dtype) -> bool:
    """Say whether writing the matrix onto a copy of the weight costs less than adding a product."""
    by_frequencies, _, written = _costs(rows, kernel)
    return dtype is torch.float32 and written < by_frequencies


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _single(kernel: Tensor) -> Tensor:
    return kernel.contiguous() if kernel.dtype is torch.float32 else kernel.float().contiguous()


def _spectrum(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return the planes of activations: (rows, blocks * 2 * lanes)."""
    return torch.mm(rows.view(-1, matrix.shape[0]), matrix).view(rows.shape[0], -1)


@dataclass(frozen=True)
class Paths:
    """The operators of the family in terms of four kernels.

    Attributes:
        mix: from a spectrum (rows, blocks * 2 * lanes) and the planes of a kernel (out blocks, in blocks, 3, lanes) to
            the spectrum of the convolution, or of its adjoint.
        contract: from the spectra of a gradient and of x, and the number of lanes, to the gradient of the planes.
        write: from a weight or None, a float32 kernel, a scale and an empty matrix, fill it with the sum.
        gather: from the gradient of a matrix, a scale and an empty float32 kernel, fill it with its gradient.
    """

    mix: Callable[[Tensor, Tensor, bool], Tensor]
    contract: Callable[[Tensor, Tensor, int], Tensor]
    write: Callable[[Tensor | None, Tensor, float, Tensor], None]
    gather: Callable[[Tensor, float, Tensor], None]

    def _weight(self, weight: Tensor | None, kernel: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        out_blocks, in_blocks, size = kernel.shape
        out = torch.empty(out_blocks * size, in_blocks * size, dtype=dtype, device=kernel.device)
        self.write(None if weight is None else weight.contiguous(), _single(kernel), scale, out)
        return out

    def _add_(self, out: Tensor, x: Tensor, kernel: Tensor, scale: float, adjoint: bool, beta: float = 1.0) -> Tensor:
        """Add the convolution of rows, or its adjoint, onto rows that nobody else holds; beta 0 overwrites them."""
        out_blocks, in_blocks, size = kernel.shape
        if x.shape[0] == 0:
            return out
        if dense_pays(x.shape[0], kernel):
            dense = self._weight(None, kernel, scale, x.dtype)
            return out.addmm_(x, dense if adjoint else dense.mT, beta=beta)
        planes = torch.mm(_single(kernel).view(-1, size), kernel_transform(size, torch.float32, kernel.device))
        # Gradients walk back through the transforms: first through that of the result.
        there, back = transform(size, x.dtype, x.device), inverse(size, x.dtype, x.device)
        there, back = (back, there) if adjoint else (there, back)
        mixed = self.mix(_spectrum(x, there), planes.view(out_blocks, in_blocks, 3, lanes(size)), adjoint)
        # The scale comes last: float16 would lose digits of a spectrum that it has made small.
        out.view(-1, size).addmm_(mixed.view(-1, 2 * lanes(size)), back.mT, beta=beta, alpha=scale)
        return out

    def _kernel_gradient(self, grad: Tensor, x: Tensor, kernel: Tensor, scale: float) -> Tensor:
        out_blocks, in_blocks, size = kernel.shape
        if x.shape[0] == 0:
            return torch.zeros_like(kernel)
        if dense_pays(x.shape[0], kernel):
            return self.circulant_weight_backward(torch.mm(grad.mT, x), kernel, scale)
        left = _spectrum(grad, inverse(size, x.dtype, x.device))
        right = _spectrum(x, transform(size, x.dtype, x.device))
        planes = self.contract(left, right, lanes(size))
        back = kernel_transform(size, torch.float32, kernel.device).mT
        found = torch.mm(planes.view(out_blocks * in_blocks, -1), back)
        return found.mul_(scale).view(kernel.shape).to(kernel.dtype)

    def circular_conv(self, x: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """See `peftk.functional.circular_conv`."""
        rows = _as_rows(x)
        out = torch.empty(rows.shape[0], kernel.shape[0] * kernel.shape[2], dtype=x.dtype, device=x.device)
        return self._add_(out, rows, kernel, scale, False, 0.0).view(*x.shape[:-1], out.shape[1])

    def circular_conv_backward(
        self, grad: Tensor, x: Tensor, kernel: Tensor, scale: float, need_x: bool, need_kernel: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients in x and in the kernel; an empty tensor for one not needed."""
        dx, dkernel = x.new_empty(0), kernel.new_empty(0)
        grad, rows = _as_rows(grad), _as_rows(x)
        if need_x:
            dx = self._add_(torch.empty_like(rows), grad, kernel, scale, True, 0.0).view(x.shape)
        if need_kernel:
            dkernel = self._kernel_gradient(grad, rows, kernel, scale)
        return dx, dkernel

    def circular_conv_add(self, base: Tensor, x: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """See `peftk.functional.circular_conv_add`."""
        rows = _as_rows(x)
        out = torch.empty(rows.shape[0], base.shape[-1], dtype=base.dtype, device=base.device)
        out.copy_(base.reshape(out.shape))
        return self._add_(out, rows, kernel, scale, False).view(base.shape)

    def circulant_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor, scale: float) -> Tensor:
        """See `peftk.functional.circulant_linear`."""
        rows = x.shape[:-1].numel()
        if merged_pays(rows, kernel, x.dtype):
            return linear(x, self._weight(weight, kernel, scale, x.dtype), bias)
        # Base first: where the kernel is zero, the output keeps every bit of the base layer's.
        y = linear(x, weight, bias)
        self._add_(y.view(rows, y.shape[-1]), _as_rows(x), kernel, scale, False)
        return y

    def circulant_linear_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        kernel: Tensor,
        scale: float,
        need_x: bool,
        need_kernel: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients in x, in the kernel and in the bias; an empty tensor for one not needed."""
        dx, dkernel = x.new_empty(0), kernel.new_empty(0)
        grad, rows = _as_rows(grad), _as_rows(x)
        if need_x:
            if merged_pays(rows.shape[0], kernel, x.dtype):
                dx = torch.mm(grad, self._weight(weight, kernel, scale, x.dtype))
            else:
                dx = self._add_(torch.mm(grad, weight), grad, kernel, scale, True)
            dx = dx.view(x.shape)
        if need_kernel:
            dkernel = self._kernel_gradient(grad, rows, kernel, scale)
        dbias = grad.sum(0) if need_bias else grad.new_empty(0)
        return dx, dkernel, dbias

    def circulant_weight(self, weight: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """See `peftk.functional.circulant_weight`."""
        return self._weight(weight, kernel, scale, weight.dtype)

    def circulant_weight_backward(self, grad: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """Return the gradient of `circulant_weight` in the kernel."""
        dkernel = torch.empty(kernel.shape, device=kernel.device)
        self.gather(grad.contiguous(), scale, dkernel)
        return dkernel.to(kernel.dtype)
