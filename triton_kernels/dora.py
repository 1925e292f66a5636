"""DoRA's norms, in one pass over the weight, and its output, in one pass over the base output."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.shared.dora import compose_backward
from . import _launch
from .butterfly import scale_channels_backward
from .low_rank import low_rank_add_backward, low_rank_add_backward_supports, low_rank_add_supports
from .low_rank_products import as_rows, rank_tile_of, shrink

# Programs that keep a large GPU busy; a weight with few rows is summed in pieces to make as many.
PROGRAMS = 512


@triton.jit
def _dora_norm_kernel(
    partial_ptr,
    weight_ptr,
    a_ptr,
    b_ptr,
    rows,
    features,
    rank,
    scale,
    stride_weight_row,
    stride_weight_feature,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Sum the squares of weight + scale * b @ a over a chunk of features, for a tile of rows."""
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    piece = (tl.program_id(0) // tiles).to(tl.int64)
    total = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_FEATURES]
    for start in range(0, CHUNK, BLOCK_FEATURES):
        column = piece * CHUNK + start + tl.arange(0, BLOCK_FEATURES)  # [BLOCK_FEATURES]
        weight = tl.load(
            weight_ptr + row[:, None] * stride_weight_row + column[None, :] * stride_weight_feature,
            mask=(row[:, None] < rows) & (column[None, :] < features),
            other=0.0,
        )  # [BLOCK_ROWS, BLOCK_FEATURES]
        update = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_FEATURES]
        for first in range(0, rank, BLOCK_RANK):
            ranks = first + tl.arange(0, BLOCK_RANK)  # [BLOCK_RANK]
            b = tl.load(
                b_ptr + row[:, None] * rank + ranks[None, :],
                mask=(row[:, None] < rows) & (ranks[None, :] < rank),
                other=0.0,
            )  # [BLOCK_ROWS, BLOCK_RANK]
            a = tl.load(
                a_ptr + ranks.to(tl.int64)[:, None] * features + column[None, :],
                mask=(ranks[:, None] < rank) & (column[None, :] < features),
                other=0.0,
            )  # [BLOCK_RANK, BLOCK_FEATURES]
            # Half-precision layers round the factors so in their products, too.
            update = tl.dot(b.to(weight.dtype), a.to(weight.dtype), update, input_precision="ieee")
        adapted = weight.to(tl.float32) + scale * update  # [BLOCK_ROWS, BLOCK_FEATURES]
        total += adapted * adapted
    tl.store(partial_ptr + piece * rows + row, tl.sum(total, 1), mask=row < rows)


@triton.jit
def _dora_compose_kernel(
    out_ptr,
    base_ptr,
    hidden_ptr,
    b_ptr,
    gain_ptr,
    bias_ptr,
    rows,
    features,
    rank,
    scale,
    stride_base_row,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Write gain * (base + scale * hidden @ b.T) + (1 - gain) * bias for a tile."""
    tiles = tl.cdiv(features, BLOCK_FEATURES)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    column = tl.program_id(0) % tiles * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)  # [BLOCK_FEATURES]
    update = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_FEATURES]
    for first in range(0, rank, BLOCK_RANK):
        ranks = first + tl.arange(0, BLOCK_RANK)  # [BLOCK_RANK]
        hidden = tl.load(
            hidden_ptr + row[:, None] * rank + ranks[None, :],
            mask=(row[:, None] < rows) & (ranks[None, :] < rank),
            other=0.0,
        )  # [BLOCK_ROWS, BLOCK_RANK]
        b = tl.load(
            b_ptr + column.to(tl.int64)[None, :] * rank + ranks[:, None],
            mask=(column[None, :] < features) & (ranks[:, None] < rank),
            other=0.0,
        )  # [BLOCK_RANK, BLOCK_FEATURES]
        update = tl.dot(hidden, b, update, input_precision="ieee")
    mask = (row[:, None] < rows) & (column[None, :] < features)  # [BLOCK_ROWS, BLOCK_FEATURES]
    # [BLOCK_ROWS, BLOCK_FEATURES]
    base = tl.load(base_ptr + row[:, None] * stride_base_row + column[None, :], mask=mask, other=0.0)
    gain = tl.load(gain_ptr + column, mask=column < features, other=0.0)  # [BLOCK_FEATURES]
    y = gain[None, :] * (base.to(tl.float32) + scale * update)  # [BLOCK_ROWS, BLOCK_FEATURES]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < features, other=0.0).to(tl.float32)  # [BLOCK_FEATURES]
        y += ((1.0 - gain) * bias)[None, :]
    tl.store(out_ptr + row[:, None] * features + column[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


def _norm_config(rank: int) -> dict[str, int]:
    """Return the tile of a weight: rows as those of `low_rank_products` in float32, and columns that spill nothing."""
    rank_tile = rank_tile_of(rank)
    return {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 64, "BLOCK_RANK": rank_tile, "num_warps": 4, "num_stages": 2}


def _compose_config(rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of an output; that of float32 stays below 64 rows, as those of `low_rank_products`."""
    rows, features = (32, 32) if dtype is torch.float32 else (64, 128)
    return {"BLOCK_ROWS": rows, "BLOCK_FEATURES": features, "BLOCK_RANK": rank_tile_of(rank), "num_warps": 4}


def dora_norm_supports(weight: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot find the norms."""
    return _launch.unsupported(weight)


def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """See `peftk.functional.dora_norm`."""
    rows, features = weight.shape
    config = _norm_config(a.shape[0])
    block = config["BLOCK_FEATURES"]
    tiles = triton.cdiv(rows, config["BLOCK_ROWS"])
    pieces = max(1, min(PROGRAMS // max(tiles, 1), triton.cdiv(features, block)))
    chunk = triton.cdiv(triton.cdiv(features, pieces), block) * block
    pieces = triton.cdiv(features, chunk) if features else 0
    partial = torch.empty(pieces, rows, dtype=torch.float32, device=weight.device)
    _launch.launch(
        _dora_norm_kernel,
        (tiles * pieces,),
        partial_ptr=partial,
        weight_ptr=weight,
        a_ptr=a.contiguous(),
        b_ptr=b.contiguous(),
        rows=rows,
        features=features,
        rank=a.shape[0],
        scale=scale,
        stride_weight_row=weight.stride(0),
        stride_weight_feature=weight.stride(1),
        CHUNK=chunk,
        **config,
    )
    return (partial[0] if pieces == 1 else partial.sum(0)).sqrt_()


def _reason(base: Tensor, x: Tensor) -> str | None:
    if base.dtype is not x.dtype:
        return f"the Triton kernels take base and x of one dtype; got {base.dtype} and {x.dtype}"
    return None


def dora_compose_supports(base: Tensor, x: Tensor, a: Tensor, b: Tensor, *args: object) -> str | None:
    """Return None, or why Triton cannot compose the output."""
    return low_rank_add_supports(base, x, a, b, None) or _reason(base, x)


def dora_compose(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, gain: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and the rank-sized product ``x @ a.T``; see `peftk.functional.dora_compose`."""
    rows, matrix, rank = as_rows(x), as_rows(base), a.shape[0]
    hidden = torch.empty(*x.shape[:-1], rank, dtype=x.dtype, device=x.device)
    shrink(rows, a, (a.stride(0), a.stride(1)), rank, hidden.view(rows.shape[0], rank))
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    gain = gain.contiguous()
    config = _compose_config(rank, x.dtype)
    tiles = triton.cdiv(matrix.shape[0], config["BLOCK_ROWS"]) * triton.cdiv(matrix.shape[1], config["BLOCK_FEATURES"])
    _launch.launch(
        _dora_compose_kernel,
        (tiles,),
        out_ptr=out,
        base_ptr=matrix,
        hidden_ptr=hidden,
        b_ptr=b.contiguous(),
        gain_ptr=gain,
        bias_ptr=gain if bias is None else bias.contiguous(),
        rows=matrix.shape[0],
        features=matrix.shape[1],
        rank=rank,
        scale=scale,
        stride_base_row=matrix.stride(0),
        HAS_BIAS=bias is not None,
        **config,
    )
    return out, hidden


def dora_compose_backward_supports(
    grad: Tensor, base: Tensor, x: Tensor, hidden: Tensor, a: Tensor, b: Tensor, *args: object
) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return low_rank_add_backward_supports(grad, x, hidden, a, b, None) or _reason(grad, x)


def dora_compose_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients in base, x, a, b, the gain and the bias; an empty tensor for one not needed."""
    return compose_backward(scale_channels_backward, low_rank_add_backward, *args)
