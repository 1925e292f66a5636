"""The Neumann series of the Cayley transform in Triton: the packed triangle is read and written in place of S.

S is skew-symmetric and every polynomial of S commutes with every other. So P(S) is a polynomial of Y = S S with
coefficients of the form c I + c' S (two degrees for one product), and all transposes are changes of sign.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, unsupported

MAX_SIZE = 256
"""Largest block: the wider rows of a panel do not fit in registers."""

RESIDENT_SIZE = 64
"""Largest block whose powers one program holds in registers; above, programs share a block by panels of rows."""

RESIDENT_GRADIENT_SIZE = 32
"""The same for the backward pass, which holds more matrices at a time."""

PANEL = 16
"""Rows in a panel."""


@triton.jit
def _coefficient(k, POLYNOMIAL: tl.constexpr, TERMS: tl.constexpr):
    """Return POLYNOMIAL[k] for a k that is known only when the kernel runs."""
    value = 0.0
    for i in tl.static_range(TERMS):
        value = tl.where(k == i, POLYNOMIAL[i], value)
    return value


@triton.jit
def _skew_entries(block_ptr, rows, cols, mask, SIZE: tl.constexpr):
    """Return S[rows, cols] of the block whose packed triangle, row by row, starts at block_ptr."""
    i = tl.minimum(rows, cols)
    j = tl.maximum(rows, cols)
    # [ROWS, COLUMNS] of the tile asked for
    entry = tl.load(block_ptr + i * (2 * SIZE - i - 1) // 2 + (j - i - 1), mask=mask & (rows != cols), other=0.0)
    return tl.where(rows < cols, entry, -entry)


@triton.jit
def _skew(packed_ptr, tile, count, stride_packed_block, SIZE: tl.constexpr, PACK: tl.constexpr, WIDTH: tl.constexpr):
    """Return PACK blocks S as one block-diagonal matrix, and the mask of the diagonal blocks."""
    rows = tl.arange(0, WIDTH)[:, None]  # [WIDTH, 1]
    cols = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    block = tile * PACK + rows // SIZE  # [WIDTH, 1]
    inside = (rows // SIZE == cols // SIZE) & (rows < PACK * SIZE) & (block < count)  # [WIDTH, WIDTH]
    return _skew_entries(packed_ptr + block * stride_packed_block, rows % SIZE, cols % SIZE, inside, SIZE), inside


@triton.jit
def _blockwise(
    product,  # [WIDTH, WIDTH]
    inside,  # [WIDTH, WIDTH]
    PACK: tl.constexpr,
):
    """Keep the diagonal blocks of a product: beside them, zeros times a block that is not finite would be NaN, which
    the next product would carry into the other blocks.
    """
    return tl.where(inside, product, 0.0) if PACK > 1 else product


@triton.jit
def _cayley_kernel(
    packed_ptr,
    blocks_ptr,
    count,
    stride_packed_block,
    SIZE: tl.constexpr,
    PACK: tl.constexpr,
    WIDTH: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Write P(S) for PACK blocks. TERMS is odd (a zero pads an even number), or 1 or 2."""
    tile = tl.program_id(0).to(tl.int64)
    s, inside = _skew(packed_ptr, tile, count, stride_packed_block, SIZE, PACK, WIDTH)  # [WIDTH, WIDTH] each
    rows = tl.arange(0, WIDTH)[:, None]  # [WIDTH, 1]
    cols = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    eye = tl.where(rows == cols, 1.0, 0.0)  # [WIDTH, WIDTH]
    if TERMS == 1:
        p = POLYNOMIAL[0] * eye  # [WIDTH, WIDTH]
    elif TERMS == 2:
        p = POLYNOMIAL[0] * eye + POLYNOMIAL[1] * s
    else:
        y = _blockwise(tl.dot(s, s, input_precision="ieee"), inside, PACK)  # [WIDTH, WIDTH]
        p = POLYNOMIAL[TERMS - 1] * y + POLYNOMIAL[TERMS - 2] * s + POLYNOMIAL[TERMS - 3] * eye
        for stage in range(TERMS // 2 - 1):
            k = TERMS - 5 - 2 * stage
            constant = _coefficient(k, POLYNOMIAL, TERMS)
            slope = _coefficient(k + 1, POLYNOMIAL, TERMS)
            p = _blockwise(tl.dot(p, y, input_precision="ieee"), inside, PACK) + slope * s + constant * eye
    block = tile * PACK + rows // SIZE  # [WIDTH, 1]
    tl.store(blocks_ptr + block * (SIZE * SIZE) + rows % SIZE * SIZE + cols % SIZE, p, mask=inside)


@triton.jit
def _cayley_backward_kernel(
    grad_ptr,
    packed_ptr,
    dpacked_ptr,
    count,
    stride_packed_block,
    SIZE: tl.constexpr,
    PACK: tl.constexpr,
    WIDTH: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Write the gradient of P(S) in the packed entries for PACK blocks.

    With A_k = c_2k I + c_2k+1 S and P = sum_k A_k Y^k, the part through the A_k is D = sum_k c_2k+1 G Y^k, and the
    part through Y is H = sum_k Q_k+1^T G Y^k with Horner's stages Q_k = Q_k+1 Y + A_k. Both sums run from the highest
    power down, beside Horner's rule for Q^T. From Y = S S, and because only the skew part counts, H gives
    S Z + Z S with Z = H + H^T, which is M - M^T with M = S Z.
    """
    tile = tl.program_id(0).to(tl.int64)
    s, inside = _skew(packed_ptr, tile, count, stride_packed_block, SIZE, PACK, WIDTH)  # [WIDTH, WIDTH] each
    rows = tl.arange(0, WIDTH)[:, None]  # [WIDTH, 1]
    cols = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    block = tile * PACK + rows // SIZE  # [WIDTH, 1]
    # [WIDTH, WIDTH]
    grad = tl.load(grad_ptr + block * (SIZE * SIZE) + rows % SIZE * SIZE + cols % SIZE, mask=inside, other=0.0)
    if TERMS == 2:
        d = POLYNOMIAL[1] * grad  # [WIDTH, WIDTH]
    else:
        y = _blockwise(tl.dot(s, s, input_precision="ieee"), inside, PACK)  # [WIDTH, WIDTH]
        d = POLYNOMIAL[TERMS - 2] * grad
        h = POLYNOMIAL[TERMS - 1] * grad  # [WIDTH, WIDTH]
        if TERMS > 3:
            eye = tl.where(rows == cols, 1.0, 0.0)  # [WIDTH, WIDTH]
            # Q^T: the sign of S changes, the sign of Y does not.
            q = POLYNOMIAL[TERMS - 1] * y - POLYNOMIAL[TERMS - 2] * s + POLYNOMIAL[TERMS - 3] * eye  # [WIDTH, WIDTH]
            step = _blockwise(tl.dot(grad, y, input_precision="ieee"), inside, PACK)  # [WIDTH, WIDTH]
            d = POLYNOMIAL[TERMS - 2] * step + POLYNOMIAL[TERMS - 4] * grad
            h = _blockwise(tl.dot(q, grad, POLYNOMIAL[TERMS - 1] * step, input_precision="ieee"), inside, PACK)
            for stage in range(TERMS // 2 - 2):
                k = TERMS - 5 - 2 * stage
                constant = _coefficient(k, POLYNOMIAL, TERMS)
                slope = _coefficient(k + 1, POLYNOMIAL, TERMS)
                q = _blockwise(tl.dot(q, y, input_precision="ieee"), inside, PACK) + (constant * eye - slope * s)
                step = tl.dot(h, y, input_precision="ieee")
                h = _blockwise(tl.dot(q, grad, step, input_precision="ieee"), inside, PACK)
                below = _coefficient(k - 1, POLYNOMIAL, TERMS)
                d = _blockwise(tl.dot(d, y, input_precision="ieee"), inside, PACK) + below * grad
        d = tl.dot(h + tl.trans(h), -s, d, input_precision="ieee")
    i = rows % SIZE  # [WIDTH, 1]
    entry = block * stride_packed_block + i * (2 * SIZE - i - 1) // 2 + (cols - rows - 1)  # [WIDTH, WIDTH]
    tl.store(dpacked_ptr + entry, d - tl.trans(d), mask=inside & (rows < cols))


@triton.jit
def _cayley_panel_kernel(
    packed_ptr,
    blocks_ptr,
    stride_packed_block,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Write a panel of rows of P(S) by Horner's rule, P S + c I, whose rows do not need each other."""
    PANELS: tl.constexpr = (SIZE + PANEL - 1) // PANEL
    program = tl.program_id(0).to(tl.int64)
    packed = packed_ptr + program // PANELS * stride_packed_block
    rows = (program % PANELS * PANEL).to(tl.int32) + tl.arange(0, PANEL)[:, None]  # [PANEL, 1]
    cols = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    ks = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    inside = (rows < SIZE) & (cols < SIZE)  # [PANEL, WIDTH]
    blocks = blocks_ptr + program // PANELS * (SIZE * SIZE)
    eye = tl.where(rows == cols, 1.0, 0.0)  # [PANEL, WIDTH]
    if TERMS == 1:
        p = POLYNOMIAL[0] * eye  # [PANEL, WIDTH]
    else:
        p = POLYNOMIAL[TERMS - 1] * _skew_entries(packed, rows, cols, inside, SIZE) + POLYNOMIAL[TERMS - 2] * eye
    tl.store(blocks + rows * SIZE + cols, p, mask=inside)
    for stage in range(TERMS - 2):
        # The panel passes through memory, where a product can take it part by part.
        tl.debug_barrier()
        p = tl.zeros((PANEL, WIDTH), tl.float32)
        for k in range(0, SIZE, BLOCK_K):
            left = tl.load(
                blocks + rows * SIZE + (k + ks)[None, :], mask=(rows < SIZE) & (k + ks < SIZE)[None, :], other=0.0
            )  # [PANEL, BLOCK_K]
            # [BLOCK_K, WIDTH]
            s = _skew_entries(packed, (k + ks)[:, None], cols, (k + ks < SIZE)[:, None] & (cols < SIZE), SIZE)
            p = tl.dot(left, s, p, input_precision="ieee")
        tl.debug_barrier()
        p += _coefficient(TERMS - 3 - stage, POLYNOMIAL, TERMS) * eye
        tl.store(blocks + rows * SIZE + cols, p, mask=inside)


@triton.jit
def _cayley_panel_backward_kernel(
    grad_ptr,
    packed_ptr,
    even_ptr,
    odd_ptr,
    ds_ptr,
    dpacked_ptr,
    stride_packed_block,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Write a panel of rows of dS - dS^T, packed, where dS = sum_j B_j G (S^T)^j and B_j = sum_i c_(i+j+1) (S^T)^i.

    S is skew, so that a term of degree i + j in dS^T is that of dS with G^T for G, negated where the degree is odd:
    the sum over G - G^T in even degrees and G + G^T in odd ones is dS - dS^T. B_j is kept as its even and its odd
    powers. From the highest j down, dS <- dS S^T + B_j G and B_(j-1) = B_j S^T + c_j I: rows do not need each other.
    """
    PANELS: tl.constexpr = (SIZE + PANEL - 1) // PANEL
    program = tl.program_id(0).to(tl.int64)
    packed = packed_ptr + program // PANELS * stride_packed_block
    first = program // PANELS * (SIZE * SIZE)
    rows = (program % PANELS * PANEL).to(tl.int32) + tl.arange(0, PANEL)[:, None]  # [PANEL, 1]
    cols = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    ks = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    inside = (rows < SIZE) & (cols < SIZE)  # [PANEL, WIDTH]
    entry = first + rows * SIZE + cols  # [PANEL, WIDTH]
    eye = tl.where(rows == cols, 1.0, 0.0)  # [PANEL, WIDTH]
    grad = tl.load(grad_ptr + entry, mask=inside, other=0.0)  # [PANEL, WIDTH]
    mirrored = tl.load(grad_ptr + first + cols * SIZE + rows, mask=inside, other=0.0)  # [PANEL, WIDTH]
    ds = POLYNOMIAL[TERMS - 1] * (grad + mirrored if TERMS % 2 else grad - mirrored)  # [PANEL, WIDTH]
    tl.store(ds_ptr + entry, ds, mask=inside)
    s = _skew_entries(packed, rows, cols, inside, SIZE)  # [PANEL, WIDTH]
    tl.store(even_ptr + entry, POLYNOMIAL[TERMS - 2] * eye, mask=inside)
    tl.store(odd_ptr + entry, -POLYNOMIAL[TERMS - 1] * s, mask=inside)
    for stage in range(TERMS - 2):
        # +1 where j = TERMS - 3 - stage is even.
        sign = 1.0 - 2.0 * ((TERMS - 3 - stage) % 2)
        tl.debug_barrier()
        # A sum of its own for each product: Triton was reported to miscompile two of them into one on sm_100. And two
        # loops, one for each right factor, or the registers do not suffice.
        ds_even = tl.zeros((PANEL, WIDTH), tl.float32)  # [PANEL, WIDTH]
        ds_odd = tl.zeros((PANEL, WIDTH), tl.float32)  # [PANEL, WIDTH]
        for k in range(0, SIZE, BLOCK_K):
            k_mask = k + ks < SIZE  # [BLOCK_K]
            part = first + rows * SIZE + (k + ks)[None, :]  # [PANEL, BLOCK_K]
            part_mask = (rows < SIZE) & k_mask[None, :]  # [PANEL, BLOCK_K]
            right_mask = k_mask[:, None] & (cols < SIZE)  # [BLOCK_K, WIDTH]
            # [BLOCK_K, WIDTH]
            grad = tl.load(grad_ptr + first + (k + ks)[:, None] * SIZE + cols, mask=right_mask, other=0.0)
            # [BLOCK_K, WIDTH]
            mirrored = sign * tl.load(grad_ptr + first + cols * SIZE + (k + ks)[:, None], mask=right_mask, other=0.0)
            left_even = tl.load(even_ptr + part, mask=part_mask, other=0.0)  # [PANEL, BLOCK_K]
            ds_even = tl.dot(left_even, grad - mirrored, ds_even, input_precision="ieee")
            left_odd = tl.load(odd_ptr + part, mask=part_mask, other=0.0)  # [PANEL, BLOCK_K]
            ds_odd = tl.dot(left_odd, grad + mirrored, ds_odd, input_precision="ieee")
        ds_even += ds_odd
        ds = tl.zeros((PANEL, WIDTH), tl.float32)
        even = tl.zeros((PANEL, WIDTH), tl.float32)  # [PANEL, WIDTH]
        odd = tl.zeros((PANEL, WIDTH), tl.float32)  # [PANEL, WIDTH]
        for k in range(0, SIZE, BLOCK_K):
            k_mask = k + ks < SIZE
            part = first + rows * SIZE + (k + ks)[None, :]
            part_mask = (rows < SIZE) & k_mask[None, :]
            right_mask = k_mask[:, None] & (cols < SIZE)
            # S^T
            right = _skew_entries(packed, cols, (k + ks)[:, None], right_mask, SIZE)  # [BLOCK_K, WIDTH]
            even = tl.dot(tl.load(odd_ptr + part, mask=part_mask, other=0.0), right, even, input_precision="ieee")
            odd = tl.dot(tl.load(even_ptr + part, mask=part_mask, other=0.0), right, odd, input_precision="ieee")
            ds = tl.dot(tl.load(ds_ptr + part, mask=part_mask, other=0.0), right, ds, input_precision="ieee")
        tl.debug_barrier()
        ds += ds_even
        even += _coefficient(TERMS - 3 - stage, POLYNOMIAL, TERMS) * eye
        tl.store(ds_ptr + entry, ds, mask=inside)
        tl.store(even_ptr + entry, even, mask=inside)
        tl.store(odd_ptr + entry, odd, mask=inside)
    # [PANEL, WIDTH]
    packed_entry = program // PANELS * stride_packed_block + rows * (2 * SIZE - rows - 1) // 2 + (cols - rows - 1)
    tl.store(dpacked_ptr + packed_entry, ds, mask=inside & (rows < cols))


def _supports(packed: Tensor, size: int, polynomial: list[float]) -> str | None:
    if reason := unsupported(packed):
        return reason
    if packed.dtype is not torch.float32:
        return f"the Triton kernels take float32 triangles; got {packed.dtype}"
    if not polynomial:
        return "the exact transform is CUDA C++'s or torch's: Triton has no inversion"
    if packed.dim() == 3:
        return "the Triton kernels take the triangles of skew-symmetric matrices; got square ones"
    if size > MAX_SIZE:
        return f"the Triton kernels transform blocks of up to {MAX_SIZE}; got {size}"
    return None


def _options(size: int, count: int, polynomial: list[float], forward: bool) -> tuple[int, dict[str, Any]]:
    """Return the number of programs, and the arguments that forward and backward share."""
    width = max(triton.next_power_of_2(size), 16)
    pack = width // size
    # Two degrees for one product: the number of coefficients is odd.
    padding = [0.0] if len(polynomial) > 2 and len(polynomial) % 2 == 0 else []
    coefficients = (*polynomial, *padding)
    return triton.cdiv(count, pack), {
        "num_warps": {16: 1, 32: 8, 64: 16 if forward else 8}[width],
        "count": count,
        "stride_packed_block": size * (size - 1) // 2,
        "SIZE": size,
        "PACK": pack,
        "WIDTH": width,
        "POLYNOMIAL": coefficients,
        "TERMS": len(coefficients),
    }


def _panel_options(size: int, polynomial: list[float]) -> dict[str, Any]:
    """Return the arguments that forward and backward share when programs share a block."""
    return {
        "num_warps": 4 if size <= 64 else 8,
        "stride_packed_block": size * (size - 1) // 2,
        "SIZE": size,
        "WIDTH": triton.next_power_of_2(size),
        "PANEL": PANEL,
        "BLOCK_K": 16,
        "POLYNOMIAL": tuple(polynomial),
        "TERMS": len(polynomial),
    }


def cayley_supports(packed: Tensor, block_size: int, polynomial: list[float]) -> str | None:
    """Return None, or why Triton cannot transform these blocks."""
    return _supports(packed, block_size, polynomial)


def cayley(packed: Tensor, block_size: int, polynomial: list[float]) -> Tensor:
    """See `peftk.functional.cayley`."""
    count = packed.shape[0]
    blocks = torch.empty(count, block_size, block_size, dtype=packed.dtype, device=packed.device)
    if block_size > RESIDENT_SIZE:
        launch(
            _cayley_panel_kernel,
            (count * triton.cdiv(block_size, PANEL),),
            packed_ptr=packed.contiguous(),
            blocks_ptr=blocks,
            **_panel_options(block_size, polynomial),
        )
        return blocks
    programs, options = _options(block_size, count, polynomial, forward=True)
    launch(_cayley_kernel, (programs,), packed_ptr=packed.contiguous(), blocks_ptr=blocks, **options)
    return blocks


def cayley_backward_supports(grad: Tensor, packed: Tensor, blocks: Tensor, polynomial: list[float]) -> str | None:
    """Return None, or why Triton cannot run the backward pass."""
    return _supports(packed, blocks.shape[-1], polynomial)


def cayley_backward(grad: Tensor, packed: Tensor, blocks: Tensor, polynomial: list[float]) -> Tensor:
    """Return the gradient of `cayley` in the packed triangles."""
    if len(polynomial) == 1 or packed.numel() == 0:
        return torch.zeros_like(packed, memory_format=torch.contiguous_format)
    count, size = packed.shape[0], blocks.shape[-1]
    dpacked = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    if size > RESIDENT_GRADIENT_SIZE:
        even, odd, ds = (torch.empty(blocks.shape, dtype=packed.dtype, device=packed.device) for _ in range(3))
        launch(
            _cayley_panel_backward_kernel,
            (count * triton.cdiv(size, PANEL),),
            grad_ptr=grad.contiguous(),
            packed_ptr=packed.contiguous(),
            even_ptr=even,
            odd_ptr=odd,
            ds_ptr=ds,
            dpacked_ptr=dpacked,
            **_panel_options(size, polynomial),
        )
        return dpacked
    programs, options = _options(size, count, polynomial, forward=False)
    launch(
        _cayley_backward_kernel,
        (programs,),
        grad_ptr=grad.contiguous(),
        packed_ptr=packed.contiguous(),
        dpacked_ptr=dpacked,
        **options,
    )
    return dpacked
