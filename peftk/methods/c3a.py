"""C3A: a block-circular convolution beside a frozen layer (Chen et al., arXiv 2407.19342)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..ops._few_rows import rows_of_one_pass
from ..ops.circulant import circulant_few
from ..ops.conv import convolution_beside, convolve_with
from ._base_layer import NONE, Few, call, plain_tensors, unobserved


def linear(
    base: nn.Module, x: Tensor, kernels: Sequence[Tensor], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NONE
) -> Tensor:
    """Return the output of a linear layer with the convolutions of its input added, each divided by `in`.

    Args:
        base: An nn.Linear, GPT-2's Conv1D, or a layer that is derived from nn.Linear and quantised; frozen.
        x: (..., in).
        kernels: Of every adapter (out / b, in / b, b), the first rows of the circulant blocks; all see the same x.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    plain = plain_tensors(base, x, args, kwargs)
    scale = 1.0 / x.shape[-1]
    summed = _summed(kernels)
    if plain is not None and len(summed) == 1 and not base.training and unobserved():
        y = circulant_few(x, *plain, summed[0], scale)
        if y is not None:
            return y
    if plain is not None:
        result = F.circulant_linear(x, *plain, summed[0], scale)
        summed = summed[1:]
    else:
        result = call(base, x, *args, **kwargs)
        x = x.to(result.dtype)
    for kernel in summed:
        result = F.circular_conv_add(result, x, kernel, scale)
    return result


def few(weight: Tensor, bias: Tensor | None, kernel: Tensor) -> Few:
    """Return how a plain linear layer with one adapter runs few rows.

    Args:
        weight: The weight of the layer, (out, in).
        bias: Its bias, (out,), or None.
        kernel: The adapter, (out / b, in / b, b).
    """
    return Few(lambda x: circulant_few(x, weight, bias, kernel, 1.0 / x.shape[-1]), rows_of_one_pass(weight.dtype))


def add(result: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """Add an adapter to the output of a linear layer, (..., out), whose input was x, (..., in)."""
    return F.circular_conv_add(result, x.to(result.dtype), kernel, 1.0 / x.shape[-1])


def _summed(kernels: Sequence[Tensor]) -> list[Tensor]:
    """Return the kernels; those of equal block sizes are one, their sum."""
    found: dict[int, Tensor] = {}
    for kernel in kernels:
        size = kernel.shape[-1]
        found[size] = found[size] + kernel if size in found else kernel
    return list(found.values())


def conv2d(
    base: nn.Conv2d, x: Tensor, kernels: Sequence[Tensor], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NONE
) -> Tensor:
    """Return the output of a 1 x 1 convolution without groups with `linear`'s sum at every place of the image.

    Args:
        base: An nn.Conv2d; frozen.
        x: (batch, in, height, width) or (in, height, width).
        kernels: As in `linear`.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    summed = _summed(kernels)
    if base.weight.dtype in (torch.float32, torch.float64):
        plain = plain_tensors(base, x, args, kwargs)
        return convolve_with(_merged_filters, base, x, *summed, plain=plain, args=args, kwargs=kwargs)
    # A young adapter would be lost in the rounding of the merged weight.
    result = base(x, *args, **kwargs)
    return result + convolution_beside(_circulant_filters, base, x, *summed).to(result.dtype)


def _merged_filters(weight: Tensor, *kernels: Tensor) -> Tensor:
    filters = weight.flatten(1)
    for kernel in kernels:
        filters = F.circulant_weight(filters, kernel, 1.0 / filters.shape[1])
    return filters.view(weight.shape)


def _circulant_filters(weight: Tensor, *kernels: Tensor) -> Tensor:
    return _merged_filters(torch.zeros_like(weight), *kernels)


def update(kernel: Tensor) -> Tensor:
    """Return the dense update, (out, in), in the dtype of the kernel, (out / b, in / b, b)."""
    rows, columns, size = kernel.shape
    return F.circulant_weight(kernel.new_zeros(rows * size, columns * size), kernel, 1.0 / (columns * size))


def merged(weight: Tensor, kernel: Tensor) -> Tensor:
    """Return a weight, (out, in) or (out, in, 1, 1), with one adapter in it."""
    return _merged_filters(weight, kernel)
