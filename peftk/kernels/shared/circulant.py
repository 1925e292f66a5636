"""The ways that lead to a circular convolution, for the backends that have kernels for their small steps.

- By frequencies: transform the blocks of the activations, mix them, transform back. The transforms are products with a
  constant matrix in the dtype of the activations, and so are the spectra, unless a backend has a faster transform.
- Dense: write the matrix of circulant blocks in the dtype of the activations and multiply by it.
- Merged: write that matrix onto a copy of the frozen weight, so that no product is added at all. For float32 alone: in
  half precision a small adapter would be lost in the rounded weight.

What costs least is decided from shapes and dtype alone, so that equal calls add in equal order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .fourier import inverse, kernel_transform, lanes, transform

WRITE, WRITE_FRESH = 40, 220
"""What writing an element of a matrix costs, in operations of a matrix product: where memory is used again, and where
that of every matrix is fresh from the operating system."""

REUSED = 2**25
"""Bytes up to which memory is used again: the largest threshold of glibc's malloc."""

LANE = 24
"""What mixing one lane of one pair of blocks costs: eight operations, at a third of the speed of a matrix product."""


def _single(kernel: Tensor) -> Tensor:
    return kernel.contiguous() if kernel.dtype is torch.float32 else kernel.float().contiguous()


class Transforms:
    """The transforms of the blocks of rows, as products with a constant matrix.

    Gradients walk back through them: first through that of the result, `inverse`, which is not the inverse for them.
    """

    def cost(self, x: Tensor, size: int) -> int:
        """Return what transforming one number costs, in operations of a matrix product."""
        return 4 * lanes(size)

    def spectrum(self, rows: Tensor, size: int, gradient: bool) -> Tensor:
        """Return the planes of rows: (rows, blocks * 2 * lanes)."""
        matrix = (inverse if gradient else transform)(size, rows.dtype, rows.device)
        return torch.mm(rows.view(-1, size), matrix).view(rows.shape[0], -1)

    def add_back_(self, out: Tensor, planes: Tensor, size: int, gradient: bool, scale: float, beta: float) -> Tensor:
        """Add what planes are the spectrum of onto rows, or overwrite them where beta is 0."""
        matrix = (transform if gradient else inverse)(size, out.dtype, out.device)
        # The scale comes last: float16 would lose digits of a spectrum that it has made small.
        out.view(-1, size).addmm_(planes.view(-1, 2 * lanes(size)), matrix.mT, beta=beta, alpha=scale)
        return out


@dataclass(frozen=True)
class Costs:
    """What the ways cost for each row, in operations of a matrix product."""

    by_frequencies: float
    dense: float
    merged: float

    @property
    def dense_pays(self) -> bool:
        """Say whether a product with the dense matrix costs less than the way through the frequencies."""
        return self.dense < self.by_frequencies

    @property
    def merged_pays(self) -> bool:
        """Say whether writing the matrix onto a copy of the weight costs less than adding a product."""
        return self.merged < self.by_frequencies


class Rows:
    """Activations or gradients, (rows, features), with the costs of the ways, and their spectrum, taken once."""

    def __init__(self, x: Tensor, kernel: Tensor, transforms: Transforms, gradient: bool = False) -> None:
        self._x, self.count = x, x.shape[:-1].numel()
        self._transforms, self._gradient, self._size = transforms, gradient, kernel.shape[-1]
        out_blocks, in_blocks, size = kernel.shape
        elements = out_blocks * in_blocks * size * size
        fresh = not kernel.is_cuda and 4 * elements > REUSED
        written = (WRITE_FRESH if fresh else WRITE) * elements / max(self.count, 1)
        transformed = transforms.cost(x, size) * size * (out_blocks + in_blocks)
        self.costs = Costs(
            transformed + LANE * lanes(size) * out_blocks * in_blocks,
            2 * elements + written,
            written if x.dtype is torch.float32 else float("inf"),
        )

    @functools.cached_property
    def rows(self) -> Tensor:
        """The activations as a contiguous matrix: a copy, where they are not, that the merged way does without."""
        return self._x.reshape(self.count, self._x.shape[-1]).contiguous()

    @functools.cached_property
    def spectrum(self) -> Tensor:
        """The planes of the blocks: (rows, blocks * 2 * lanes)."""
        return self._transforms.spectrum(self.rows, self._size, self._gradient)


@dataclass(frozen=True)
class Paths:
    """The operators of the family in terms of five kernels and of the transforms.

    Attributes:
        mix: from a spectrum (rows, blocks * 2 * lanes) and the planes of a kernel (out blocks, in blocks, 3, lanes) to
            the spectrum of the convolution, or of its adjoint.
        contract: from the spectra of a gradient and of x, and the number of lanes, to the gradient of the planes.
        write: from a weight or None, a float32 kernel, a scale and an empty matrix, fill it with the sum.
        gather: from the gradient of a matrix, a scale and an empty float32 kernel, fill it with its gradient.
        transforms: the transforms of activations and gradients.
        product: from two matrices to their product, whose sums are not rounded to half precision.
    """

    mix: Callable[[Tensor, Tensor, bool], Tensor]
    contract: Callable[[Tensor, Tensor, int], Tensor]
    write: Callable[[Tensor | None, Tensor, float, Tensor], None]
    gather: Callable[[Tensor, float, Tensor], None]
    transforms: Transforms
    product: Callable[[Tensor, Tensor], Tensor]

    def _weight(self, weight: Tensor | None, kernel: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        out_blocks, in_blocks, size = kernel.shape
        out = torch.empty(out_blocks * size, in_blocks * size, dtype=dtype, device=kernel.device)
        self.write(None if weight is None else weight.contiguous(), _single(kernel), scale, out)
        return out

    def _add_(self, out: Tensor, x: Rows, kernel: Tensor, scale: float, adjoint: bool, beta: float = 1.0) -> Tensor:
        """Add the convolution of rows, or its adjoint, onto rows that nobody else holds; beta 0 overwrites them."""
        out_blocks, in_blocks, size = kernel.shape
        rows = x.rows
        if rows.shape[0] == 0:
            return out
        if x.costs.dense_pays:
            dense = self._weight(None, kernel, scale, rows.dtype)
            return out.addmm_(rows, dense if adjoint else dense.mT, beta=beta)
        planes = torch.mm(_single(kernel).view(-1, size), kernel_transform(size, torch.float32, kernel.device))
        mixed = self.mix(x.spectrum, planes.view(out_blocks, in_blocks, 3, lanes(size)), adjoint)
        return self.transforms.add_back_(out, mixed, size, adjoint, scale, beta)

    def _kernel_gradient(self, grad: Rows, x: Rows, kernel: Tensor, scale: float) -> Tensor:
        out_blocks, in_blocks, size = kernel.shape
        if x.rows.shape[0] == 0:
            return torch.zeros_like(kernel)
        if x.costs.dense_pays:
            return self.circulant_weight_backward(self.product(grad.rows.mT, x.rows), kernel, scale)
        planes = self.contract(grad.spectrum, x.spectrum, lanes(size))
        back = kernel_transform(size, torch.float32, kernel.device).mT
        found = torch.mm(planes.view(out_blocks * in_blocks, -1), back)
        return found.mul_(scale).view(kernel.shape).to(kernel.dtype)

    def circular_conv(self, x: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """See `peftk.functional.circular_conv`."""
        out = torch.empty(x.shape[:-1].numel(), kernel.shape[0] * kernel.shape[2], dtype=x.dtype, device=x.device)
        return self._add_(out, Rows(x, kernel, self.transforms), kernel, scale, False, 0.0).view(
            *x.shape[:-1], out.shape[1]
        )

    def circular_conv_backward(
        self, grad: Tensor, x: Tensor, kernel: Tensor, scale: float, need_x: bool, need_kernel: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients in x and in the kernel; an empty tensor for one not needed."""
        dx, dkernel = x.new_empty(0), kernel.new_empty(0)
        gradient, rows = Rows(grad, kernel, self.transforms, True), Rows(x, kernel, self.transforms)
        if need_x:
            dx = self._add_(torch.empty_like(rows.rows), gradient, kernel, scale, True, 0.0).view(x.shape)
        if need_kernel:
            dkernel = self._kernel_gradient(gradient, rows, kernel, scale)
        return dx, dkernel

    def circular_conv_add(self, base: Tensor, x: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """See `peftk.functional.circular_conv_add`."""
        out = torch.empty(x.shape[:-1].numel(), base.shape[-1], dtype=base.dtype, device=base.device)
        out.copy_(base.reshape(out.shape))
        return self._add_(out, Rows(x, kernel, self.transforms), kernel, scale, False).view(base.shape)

    def circulant_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor, scale: float) -> Tensor:
        """See `peftk.functional.circulant_linear`."""
        activations = Rows(x, kernel, self.transforms)
        if activations.costs.merged_pays:
            return linear(x, self._weight(weight, kernel, scale, x.dtype), bias)
        # Base first: where the kernel is zero, the output keeps every bit of the base layer's.
        y = linear(x, weight, bias)
        self._add_(y.view(activations.count, y.shape[-1]), activations, kernel, scale, False)
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
        gradient, rows = Rows(grad, kernel, self.transforms, True), Rows(x, kernel, self.transforms)
        grad = gradient.rows
        if need_x:
            if gradient.costs.merged_pays:
                dx = torch.mm(grad, self._weight(weight, kernel, scale, x.dtype))
            else:
                dx = self._add_(torch.mm(grad, weight), gradient, kernel, scale, True)
            dx = dx.view(x.shape)
        if need_kernel:
            dkernel = self._kernel_gradient(gradient, rows, kernel, scale)
        dbias = grad.sum(0) if need_bias else grad.new_empty(0)
        return dx, dkernel, dbias

    def circulant_weight(self, weight: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """See `peftk.functional.circulant_weight`."""
        return self._weight(weight, kernel, scale, weight.dtype)

    def circulant_weight_backward(self, grad: Tensor, kernel: Tensor, scale: float) -> Tensor:
        """Return the gradient of `circulant_weight` in the kernel."""
        dkernel = kernel.new_empty(kernel.shape, dtype=torch.float32)
        self.gather(grad.contiguous(), scale, dkernel)
        return dkernel.to(kernel.dtype)


def operators(paths: Paths, reason: Callable[[Tensor], str | None]) -> dict[str, Callable[..., Any]]:
    """Return the operators of a backend and their predicates by name, from its small steps.

    `reason` says why the backend cannot convolve activations like these, or returns None.
    """

    def add_reason(base: Tensor, x: Tensor, *args: object) -> str | None:
        if base.dtype is not x.dtype:
            return f"base and x must share a dtype to be accumulated in place; got {base.dtype} and {x.dtype}"
        return reason(x)

    def first_reason(x: Tensor, *args: object) -> str | None:
        return reason(x)

    def second_reason(grad: Tensor, x: Tensor, *args: object) -> str | None:
        return reason(x)

    found: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "circular_conv": (paths.circular_conv, first_reason),
        "circular_conv_backward": (paths.circular_conv_backward, second_reason),
        "circular_conv_add": (paths.circular_conv_add, add_reason),
        "circular_conv_add_backward": (paths.circular_conv_backward, second_reason),
        "circulant_linear": (paths.circulant_linear, first_reason),
        "circulant_linear_backward": (paths.circulant_linear_backward, second_reason),
        "circulant_weight": (paths.circulant_weight, first_reason),
        "circulant_weight_backward": (paths.circulant_weight_backward, first_reason),
    }
    kernels = {name: kernel for name, (kernel, _) in found.items()}
    return kernels | {f"{name}_supports": supports for name, (_, supports) in found.items()}
