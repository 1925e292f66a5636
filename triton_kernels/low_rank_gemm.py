"""Design D1: a persistent product whose last steps read the low-rank factors, so that the output is written once.

``out = x @ weight.T + hidden @ factor.T + bias`` is one product over the concatenated columns of (x, hidden). Nothing
is concatenated: tiles come through TMA descriptors, from the second pair of matrices once the first is used up. Scale
and gate are folded into hidden beforehand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _launch

MAX_RANK = 256

_assumed: tuple[tuple[int, int], int] | None = None


@contextlib.contextmanager
def assume(capability: tuple[int, int], multiprocessors: int) -> Iterator[None]:
    """Plan launches for a device that is not there: its compute capability and number of multiprocessors."""
    global _assumed
    before, _assumed = _assumed, (capability, multiprocessors)
    try:
        yield
    finally:
        _assumed = before


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability, (0, 0) where there is none; an H200's where launches are only recorded."""
    if _assumed is not None:
        return _assumed[0]
    if device.type != "cuda":
        return 9, 0
    return (0, 0) if torch.version.hip else _launch.capability_of(device.index)


def _multiprocessors(device: torch.device) -> int:
    if _assumed is not None:
        return _assumed[1]
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    # Interpreted, few programs let each have several tiles.
    return 132 if device.type == "meta" else 2


def unsupported(x: Tensor, weight: Tensor, rank: int) -> str | None:
    """Return None if the product can be extended, else why not."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"D1 takes float16 and bfloat16; got {x.dtype}"
    if capability(x.device) < (9, 0):
        return f"D1 needs TMA, compute capability 9.0; {x.device} has {capability(x.device)}"
    if rank > MAX_RANK:
        return f"D1 takes ranks up to {MAX_RANK}; got {rank}"
    if 0 in x.shape or 0 in weight.shape or weight.shape[0] % 8 or weight.shape[1] % 8:
        return f"D1 needs sizes that are positive multiples of 8; got {tuple(x.shape)} and {tuple(weight.shape)}"
    return None


@triton.jit
def _linear_kernel(
    x_descriptor,
    weight_descriptor,
    hidden_descriptor,
    factor_descriptor,
    out_descriptor,
    bias_ptr,
    rows,
    features,
    out_features,
    rank,
    programs,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """Compute out = x @ weight.T + hidden @ factor.T + bias; TRANSPOSED: x @ weight + hidden @ factor."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    out_tiles = tl.cdiv(out_features, BLOCK_OUT)
    # Tiles that run at one time form nearly square patches of the output, whose operands fit the L2 cache.
    patch = GROUP_ROWS * out_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * out_tiles, programs):
        first_row_tile = tile // patch * GROUP_ROWS
        height = min(row_tiles - first_row_tile, GROUP_ROWS)
        row = (first_row_tile + tile % patch % height) * BLOCK_ROWS
        column = tile % patch // height * BLOCK_OUT
        accumulator = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_OUT]
        for step in range(tl.cdiv(features, BLOCK_FEATURES)):
            x = x_descriptor.load([row, step * BLOCK_FEATURES])  # [BLOCK_ROWS, BLOCK_FEATURES]
            if TRANSPOSED:
                weight = weight_descriptor.load([step * BLOCK_FEATURES, column])  # [BLOCK_FEATURES, BLOCK_OUT]
            else:
                weight = weight_descriptor.load([column, step * BLOCK_FEATURES]).T
            accumulator = tl.dot(x, weight, accumulator)
        # A loop, even for one step: Triton 3.6 and 3.7 miscompile two dots into one accumulator in one loop body on
        # sm_100, and its tile loop, flattened around two loops, does not compile there.
        for step in range(tl.cdiv(rank, BLOCK_RANK)):
            hidden = hidden_descriptor.load([row, step * BLOCK_RANK])  # [BLOCK_ROWS, BLOCK_RANK]
            if TRANSPOSED:
                factor = factor_descriptor.load([step * BLOCK_RANK, column])  # [BLOCK_RANK, BLOCK_OUT]
            else:
                factor = factor_descriptor.load([column, step * BLOCK_RANK]).T
            accumulator = tl.dot(hidden, factor, accumulator)
        if HAS_BIAS:
            columns = column + tl.arange(0, BLOCK_OUT)  # [BLOCK_OUT]
            bias = tl.load(bias_ptr + columns, mask=columns < out_features, other=0.0)  # [BLOCK_OUT]
            accumulator += bias.to(tl.float32)[None, :]
        out_descriptor.store([row, column], accumulator.to(out_descriptor.dtype))


def _described(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Describe a matrix to TMA, which wants aligned rows, one after the other; a copy only where they are not."""
    if x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16 or x.stride(0) < x.shape[1] or x.stride(1) != 1:
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _config(rank: int) -> dict[str, int]:
    """Return the tile, of the usual size of a product on Hopper, and patches of 8 row tiles; no timing picked it."""
    block_rank = min(64, max(16, 1 << (rank - 1).bit_length()))
    tile = {"BLOCK_ROWS": 128, "BLOCK_OUT": 256, "BLOCK_FEATURES": 64, "BLOCK_RANK": block_rank, "GROUP_ROWS": 8}
    return {**tile, "num_warps": 8, "num_stages": 3}


def extended_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    factor: Tensor,
    gate: Tensor | None = None,
    scale: float = 1.0,
    *,
    transposed: bool = False,
) -> Tensor:
    """Return ``x @ weight.T + scale * (hidden * gate) @ factor.T + bias``.

    Args:
        x: (rows, features).
        weight: (out, features), or (features, out) if transposed.
        bias: (out,) or None.
        hidden: (rows, rank).
        factor: (out, rank), or (rank, out) if transposed.
        gate: None, (rank,) or (rows, rank).
        scale: a number.
        transposed: multiply by weight and factor as they are.
    """
    (rows, features), rank = x.shape, hidden.shape[1]
    out_features = weight.shape[1 if transposed else 0]
    if gate is not None or scale != 1.0:
        hidden = hidden.float() * scale
        hidden = (hidden if gate is None else hidden * gate).to(x.dtype)
    if rank % 8:
        # Rows of a multiple of 16 bytes, for TMA.
        padding = 8 - rank % 8
        hidden = torch.nn.functional.pad(hidden, (0, padding))
        factor = torch.nn.functional.pad(factor, (0, 0, 0, padding) if transposed else (0, padding))
        rank += padding
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    config = _config(rank)
    block_rows, block_out, block_features, block_rank = (
        config[f"BLOCK_{name}"] for name in ("ROWS", "OUT", "FEATURES", "RANK")
    )
    programs = min(_multiprocessors(x.device), triton.cdiv(rows, block_rows) * triton.cdiv(out_features, block_out))
    _launch.launch(
        _linear_kernel,
        (programs,),
        x_descriptor=_described(x, [block_rows, block_features]),
        weight_descriptor=_described(
            weight, [block_features, block_out] if transposed else [block_out, block_features]
        ),
        hidden_descriptor=_described(hidden, [block_rows, block_rank]),
        factor_descriptor=_described(factor, [block_rank, block_out] if transposed else [block_out, block_rank]),
        out_descriptor=_described(out, [block_rows, block_out]),
        bias_ptr=out if bias is None else bias.contiguous(),
        rows=rows,
        features=features,
        out_features=out_features,
        programs=programs,
        HAS_BIAS=bias is not None,
        TRANSPOSED=transposed,
        rank=rank,
        **config,
    )
    return out
