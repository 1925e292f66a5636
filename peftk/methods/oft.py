"""OFT: the input of a frozen layer, or the filters of a convolution, rotated block by block (Qiu et al., arXiv
2306.07280; by the Cayley-Neumann series: arXiv 2506.19847).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..ops._few_rows import FEW, rotated_few, rotated_rows, rows_of_one_pass
from ..ops.conv import convolve_with
from ..ops.kept import Kept
from ._base_layer import NONE, Few, call, plain_tensors, unobserved


def rotations(
    packed: Tensor,
    block_size: int,
    terms: int | None = None,
    kept: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the orthogonal blocks of an adapter, (blocks, b, b), which all other functions here take.

    Args:
        packed: (blocks, b (b - 1) / 2), the triangles of skew-symmetric matrices; one row if all blocks share it.
        block_size: b.
        terms: The number of terms of the Cayley-Neumann series; None for the exact transform.
        kept: (blocks,), which blocks rotate in this pass; the others are the identity. None for all of them.
        dtype: Compute in this dtype; None for that of `packed`, in float32 at least.
    """
    blocks = F.cayley(packed if dtype is None else packed.to(dtype), block_size, neumann_terms=terms)
    if kept is None:
        return blocks
    eye = torch.eye(block_size, device=blocks.device, dtype=blocks.dtype)
    return torch.where(kept.to(blocks.device).view(-1, 1, 1), blocks, eye)


def project(packed: Tensor, eps: float) -> Tensor:
    """Scale each packed skew matrix that lies outside the ball of COFT, of radius ``eps / sqrt(blocks)``, onto it."""
    radius = eps / math.sqrt(packed.shape[0])
    # A skew matrix holds every packed entry twice.
    norm = math.sqrt(2) * torch.linalg.vector_norm(packed, dim=1, keepdim=True)
    # The slack makes projecting a projected matrix a no-op in spite of rounding.
    return torch.where(norm > radius * (1 + 1e-6), packed * (radius / norm), packed)


@torch.no_grad()
def orthogonality_error(blocks: Tensor) -> float:
    """Return max |R R^T - I| over all blocks; infinity if it is not finite."""
    if blocks.numel() == 0:
        return 0.0
    with torch.autocast(blocks.device.type, enabled=False):
        product = blocks.detach() @ blocks.detach().mT
    product.diagonal(dim1=-2, dim2=-1).sub_(1)
    error = product.abs_().amax().item()
    return error if math.isfinite(error) else math.inf


def linear(
    base: nn.Module, x: Tensor, blocks: Sequence[Tensor], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NONE
) -> Tensor:
    """Return the output of a linear layer whose input is rotated by one adapter after the other.

    Args:
        base: An nn.Linear, GPT-2's Conv1D, or a layer that is derived from nn.Linear and quantised; frozen.
        x: (..., in).
        blocks: The blocks of every adapter, the first one next to x; each (blocks, b, b), or (1, b, b) if shared.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    if len(blocks) == 1:
        plain = plain_tensors(base, x, args, kwargs)
        if plain is not None:
            if not base.training and unobserved() and (y := _few(x, *plain, blocks[0])) is not None:
                return y
            return F.block_rotate_linear(x, *plain, blocks[0])
    for one in blocks:
        x = F.block_rotate(x, one)
    return call(base, x, *args, **kwargs)


def few(
    weight: Tensor, bias: Tensor | None, packed: Tensor, block_size: int, terms: int | None, kept: Kept | None = None
) -> Few:
    """Return how a plain linear layer with one adapter runs few rows.

    Args:
        weight: The weight of the layer, (out, in).
        bias: Its bias, (out,), or None.
        packed: As in `rotations`, as are the next two.
        block_size: The size of a block.
        terms: The number of terms of the series, or None.
        kept: Where the blocks are kept, of the settings `block_size` and `terms`; None for a place of its own.
    """
    place, settings = Kept() if kept is None else kept, (block_size, terms)
    most = rows_of_one_pass(weight.dtype) * weight.shape[1]

    def run(x: Tensor) -> Tensor | None:
        # Usually nothing has changed, which the call that reads the weight finds out by itself.
        held = place.held(settings) if x.numel() <= most else None
        if held is not None:
            bits, blocks = held
            y = rotated_few(x, weight, bias, blocks, None, (packed,), bits)
            if y is not None:
                return y
        blocks = place.get((packed,), lambda: rotations(packed, block_size, terms), settings)
        return _few(x, weight, bias, blocks)

    return Few(run, _most(weight.dtype))


def _most(dtype: torch.dtype) -> int:
    # In half precision the operator's rotation is the faster one beyond what one pass takes.
    return FEW if dtype is torch.float32 else rows_of_one_pass(dtype)


def _few(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor | None:
    if x.numel() > _most(x.dtype) * x.shape[-1]:
        return None
    one_pass = x.numel() <= rows_of_one_pass(x.dtype) * x.shape[-1]
    return (rotated_few if one_pass else rotated_rows)(x, weight, bias, blocks)


def conv2d(
    base: nn.Conv2d, x: Tensor, blocks: Sequence[Tensor], args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NONE
) -> Tensor:
    """Return the output of a convolution without groups whose flattened filters are rotated: ``W'[o] = R W[o]``.

    Args:
        base: An nn.Conv2d; frozen.
        x: (batch, in, height, width) or (in, height, width).
        blocks: As in `linear`, over in * height * width of the kernel.
        args: Further arguments of the base layer.
        kwargs: Its keyword arguments.
    """
    plain = plain_tensors(base, x, args, kwargs)
    return convolve_with(_rotated, base, x, *blocks, plain=plain, args=args, kwargs=kwargs)


def _rotated(weight: Tensor, *blocks: Tensor) -> Tensor:
    filters = weight.flatten(1)
    for one in reversed(blocks):
        filters = F.block_rotate(filters, one, transpose=True)
    return filters.view(weight.shape)


def rotated(rows: Tensor, blocks: Tensor) -> Tensor:
    """Return rows, (..., features), such as those of an embedding, that are rotated: ``rows R``."""
    return F.block_rotate(rows, blocks)


def rotation(blocks: Tensor, count: int) -> Tensor:
    """Return the dense rotation, (in, in), of `count` blocks, which may be one that all share."""
    return torch.block_diag(*blocks.expand(count, -1, -1))


def merged(weight: Tensor, blocks: Tensor) -> Tensor:
    """Return a weight, (out, in) or (out, in, height, width), with one adapter in it."""
    return _rotated(weight, blocks)
