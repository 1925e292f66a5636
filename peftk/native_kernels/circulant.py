"""Circular convolution with C++ between the spectra and for the dense matrix; products are torch's.

Which way a call takes is decided in `torch_kernels/_circulant_paths.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C  # noqa: F401 - importing it registers the operators of peftk_native
from ..torch_kernels._circulant_paths import Paths
from ._supports import supports_activations

# Looked up once: the look-up of an operator by name costs as much as a small kernel.
_mix_planes = torch.ops.peftk_native.circulant_mix.default
_contract_planes = torch.ops.peftk_native.circulant_contract.default
_write_weight = torch.ops.peftk_native.circulant_weight.default
_gather = torch.ops.peftk_native.circulant_weight_backward.default


def _mix(spectrum: Tensor, planes: Tensor, adjoint: bool) -> Tensor:
    out_blocks, in_blocks, _, lanes = planes.shape
    out = torch.empty(spectrum.shape[0], (in_blocks if adjoint else out_blocks) * 2 * lanes, dtype=spectrum.dtype)
    _mix_planes(spectrum, planes, adjoint, out)
    return out


def _contract(grad: Tensor, x: Tensor, lanes: int) -> Tensor:
    out = torch.empty(grad.shape[1] // (2 * lanes), x.shape[1] // (2 * lanes), 3, lanes)
    _contract_planes(grad, x, out)
    return out


def _write(weight: Tensor | None, kernel: Tensor, scale: float, out: Tensor) -> None:
    _write_weight(out.new_empty(0) if weight is None else weight, kernel, scale, out)


_paths = Paths(_mix, _contract, _write, _gather)

circular_conv = _paths.circular_conv
circular_conv_backward = _paths.circular_conv_backward
circular_conv_add = _paths.circular_conv_add
circular_conv_add_backward = _paths.circular_conv_backward
circulant_linear = _paths.circulant_linear
circulant_linear_backward = _paths.circulant_linear_backward
circulant_weight = _paths.circulant_weight
circulant_weight_backward = _paths.circulant_weight_backward


def circular_conv_supports(x: Tensor, kernel: Tensor, scale: float) -> str | None:
    """Return None, or why C++ cannot convolve x."""
    return supports_activations(x)


def circular_conv_backward_supports(grad: Tensor, x: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    return supports_activations(x)


def circular_conv_add_supports(base: Tensor, x: Tensor, kernel: Tensor, scale: float) -> str | None:
    """Return None, or why C++ cannot add onto the base."""
    if base.dtype is not x.dtype:
        return f"base and x must share a dtype to be accumulated in place; got {base.dtype} and {x.dtype}"
    return supports_activations(x)


circular_conv_add_backward_supports = circular_conv_backward_supports


def circulant_linear_supports(x: Tensor, *args: object) -> str | None:
    """Return None, or why C++ cannot convolve x."""
    return supports_activations(x)


circulant_linear_backward_supports = circular_conv_backward_supports


def circulant_weight_supports(weight: Tensor, kernel: Tensor, scale: float) -> str | None:
    """Return None, or why C++ cannot write the weight."""
    return supports_activations(weight)


def circulant_weight_backward_supports(grad: Tensor, kernel: Tensor, scale: float) -> str | None:
    """Return None, or why C++ cannot run the backward pass."""
    return supports_activations(grad)
