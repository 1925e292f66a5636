"""Circular convolution of blocks in plain PyTorch.

float32 and float64 go through the fast Fourier transform. It has no bfloat16 and little float16: there the transform is
a product with a constant matrix (`_fourier`), so that no float32 copy of the activations is made.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..shared.fourier import inverse, kernel_transform, lanes, transform
from ..shared.wide import wide_product


def _exact(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def _blocks(x: Tensor, size: int) -> Tensor:
    """View activations block by block: (rows, blocks, b)."""
    return x.reshape(-1, x.shape[-1] // size, size)


def _spectrum(x: Tensor, matrix: Tensor) -> Tensor:
    """Return the planes of activations by lane: (lanes, rows, blocks, 2)."""
    size = matrix.shape[0]
    planes = _blocks(x, size) @ matrix
    return planes.unflatten(-1, (2, lanes(size))).permute(3, 0, 1, 2)


def _mixer(kernel: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one real matrix for each lane, (lanes, in blocks * 2, out blocks * 2)."""
    out_blocks, in_blocks, size = kernel.shape
    planes = kernel.float() @ kernel_transform(size, torch.float32, kernel.device)
    a, s, c = planes.unflatten(-1, (3, lanes(size))).permute(2, 3, 1, 0)  # (lanes, in blocks, out blocks)
    mixer = torch.stack((torch.stack((a, -s), -1), torch.stack((s, c), -1)), 2)  # (lanes, in, 2, out, 2)
    return mixer.reshape(lanes(size), in_blocks * 2, out_blocks * 2).to(dtype)


def _mix(x: Tensor, kernel: Tensor, adjoint: bool) -> Tensor:
    """Convolve by matrix products: x with the kernel, or a gradient with its adjoint."""
    size = kernel.shape[-1]
    # Gradients walk back through the transforms: first through that of the result.
    there, back = transform(size, x.dtype, x.device), inverse(size, x.dtype, x.device)
    there, back = (back, there) if adjoint else (there, back)
    planes, mixer = _spectrum(x, there).flatten(2), _mixer(kernel, x.dtype)
    mixed = torch.bmm(planes, mixer.mT if adjoint else mixer).unflatten(-1, (-1, 2))
    return mixed.permute(1, 2, 3, 0).flatten(2) @ back.mT


def _convolve(x: Tensor, kernel: Tensor, scale: float, adjoint: bool) -> Tensor:
    """Return the convolution, or its adjoint for gradients, in the shape of the leading dimensions of x."""
    size = kernel.shape[-1]
    features = kernel.shape[1 if adjoint else 0] * size
    if x.shape[:-1].numel() == 0:
        return x.new_empty(*x.shape[:-1], features)
    if _exact(x):
        spectra, weights = torch.fft.rfft(_blocks(x, size)), torch.fft.rfft(kernel.to(x.dtype))
        # A lazy conjugate is lost inside an operator that a compiled graph calls.
        pattern, weights = ("tmf,mnf->tnf", weights) if adjoint else ("tnf,mnf->tmf", weights.conj_physical())
        y = torch.fft.irfft(torch.einsum(pattern, spectra, weights), size)
    else:
        y = _mix(x, kernel, adjoint)
    return (y * scale).reshape(*x.shape[:-1], features)


def _kernel_gradient(grad: Tensor, x: Tensor, kernel: Tensor, scale: float) -> Tensor:
    size = kernel.shape[-1]
    if grad.numel() == 0:
        return torch.zeros_like(kernel)
    if _exact(x):
        left, right = torch.fft.rfft(_blocks(grad, size)), torch.fft.rfft(_blocks(x, size))
        found = torch.fft.irfft(torch.einsum("tmf,tnf->mnf", left.conj_physical(), right), size)
        return (found * scale).to(kernel.dtype)
    out_blocks, in_blocks, _ = kernel.shape
    left = _spectrum(grad, inverse(size, x.dtype, x.device)).flatten(2)
    right = _spectrum(x, transform(size, x.dtype, x.device)).flatten(2)
    products = wide_product(left.mT, right).view(lanes(size), out_blocks, 2, in_blocks, 2)
    # The planes of `kernel_transform`: (a, s, c) multiply (re, im) to (a re + s im, c im - s re).
    a, s, c = products[:, :, 0, :, 0], products[:, :, 0, :, 1] - products[:, :, 1, :, 0], products[:, :, 1, :, 1]
    planes = torch.stack((a, s, c)).permute(2, 3, 0, 1).flatten(2)
    found = planes @ kernel_transform(size, torch.float32, kernel.device).mT
    return (found * scale).to(kernel.dtype)


def circular_conv(x: Tensor, kernel: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.circular_conv`."""
    return _convolve(x, kernel, scale, False).contiguous()


def circular_conv_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, scale: float, need_x: bool, need_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients in x and in the kernel; an empty tensor for one not needed."""
    dx = _convolve(grad, kernel, scale, True).contiguous() if need_x else x.new_empty(0)
    return dx, _kernel_gradient(grad, x, kernel, scale) if need_kernel else kernel.new_empty(0)


def circular_conv_add(base: Tensor, x: Tensor, kernel: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.circular_conv_add`."""
    return (base + _convolve(x, kernel, scale, False)).to(base.dtype).contiguous()


circular_conv_add_backward = circular_conv_backward


def circulant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.circulant_linear`."""
    return linear(x, weight, bias) + _convolve(x, kernel, scale, False)


def circulant_linear_backward(
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
    dx, dkernel = circular_conv_backward(grad, x, kernel, scale, need_x, need_kernel)
    if need_x:
        dx = grad @ weight + dx
    dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else grad.new_empty(0)
    return dx, dkernel, dbias


def circulant_weight(weight: Tensor, kernel: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.circulant_weight`."""
    dense = (kernel * scale).to(weight.dtype if _exact(weight) else torch.float32)
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    size = kernel.shape[-1]
    index = torch.arange(size, device=weight.device)
    places = (index[None, :] - index[:, None]) % size  # (p, q)
    # One row of blocks at a time: no float32 matrix of the weight's size.
    for rows, result, blocks in zip(weight.split(size), out.split(size), dense, strict=True):
        result.copy_(rows + blocks[:, places].transpose(0, 1).flatten(1))
    return out


def circulant_weight_backward(grad: Tensor, kernel: Tensor, scale: float) -> Tensor:
    """Return the gradient of `circulant_weight` in the kernel."""
    size = kernel.shape[-1]
    index = torch.arange(size, device=grad.device)
    places = (index[None, :] + index[:, None]) % size  # (p, l)
    dtype = grad.dtype if _exact(grad) else torch.float32
    found = []
    for rows in grad.split(size):
        blocks = rows.to(dtype).reshape(size, -1, size).transpose(0, 1)  # (in blocks, p, q)
        found.append(blocks.gather(2, places.expand(blocks.shape)).sum(1))
    return (torch.stack(found) * scale).to(kernel.dtype)
