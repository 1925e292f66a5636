"""The repaired interpreter computes as a GPU does; the interpreter as it comes does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from peftk.triton_kernels._launch import launch

from peftk.testing.compare import LIMITS, assert_close, error

BF16 = torch.bfloat16


@triton.jit
def _gemm(x_ptr, w_ptr, y_ptr, rows, inner, columns, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inner, INNER):
        k = start + tl.arange(0, INNER)
        x_mask = (row < rows)[:, None] & (k < inner)[None, :]
        w_mask = (k < inner)[:, None] & (column < columns)[None, :]
        x = tl.load(x_ptr + row[:, None] * inner + k[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_ptr + k[:, None] * columns + column[None, :], mask=w_mask, other=0.0)
        total = tl.dot(x, w, total)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    y = y_ptr + row[:, None] * columns + column[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile(x_ptr, w_ptr, y_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(y_ptr + index, tl.dot(tl.load(x_ptr + index), tl.load(w_ptr + index)))


@triton.jit
def _elementwise(x_ptr, y_ptr, sums_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane)
    if OPERATION == "add":
        y = x + x * 3
    elif OPERATION == "divide":
        y = (1.0 / (x * x + 1.0)).to(x.dtype)
    elif OPERATION == "negate":
        y = -x
    elif OPERATION == "where":
        y = tl.where((x > 0.5) & (x < 1.5), x, -1.0)
    elif OPERATION == "fma":
        y = tl.fma(x, x, x)
    elif OPERATION == "maximum":
        y = tl.maximum(x, 0.25)
    elif OPERATION == "absolute":
        y = tl.abs(x)
    elif OPERATION == "exponential":
        y = tl.exp(x.to(tl.float32)).to(x.dtype)
    elif OPERATION == "half":
        y = x.to(tl.float16).to(x.dtype)
    elif OPERATION == "integer":
        y = x.to(tl.int32).to(x.dtype)
    elif OPERATION == "rounded":
        y = (x.to(tl.float32) * 1.0009765625).to(x.dtype, fp_downcast_rounding="rtne")
    elif OPERATION == "scan":
        y = tl.cumsum(x.to(tl.float32), 0).to(x.dtype)
    tl.store(y_ptr + lane, y)
    tl.store(sums_ptr, tl.sum(x, 0))
    tl.store(sums_ptr + 1, tl.max(x, 0))
    tl.store(sums_ptr + 2, tl.min(x, 0))
    tl.store(sums_ptr + 3, tl.sum(tl.reshape(x, (BLOCK // 2, 2))))


@triton.jit
def _cast(x_ptr, y_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(y_ptr + lane, tl.load(x_ptr + lane).to(y_ptr.dtype.element_ty))


def gemm(x, w, out=None):
    y = torch.empty(x.shape[0], w.shape[1], dtype=out or x.dtype)
    shape = {"rows": x.shape[0], "inner": x.shape[1], "columns": w.shape[1]}
    grid = triton.cdiv(x.shape[0], 32), triton.cdiv(w.shape[1], 32)
    launch(_gemm, grid, num_warps=4, x_ptr=x, w_ptr=w, y_ptr=y, **shape, ROWS=32, INNER=16, COLUMNS=32)
    return y


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_a_half_precision_product_is_the_rounded_exact_one(dtype):
    # Whole numbers: every sum is exact in float32, so that the only rounding is the last.
    x, w = torch.randint(-8, 9, (50, 70)).to(dtype), torch.randint(-8, 9, (70, 40)).to(dtype)
    assert torch.equal(gemm(x, w), (x.double() @ w.double()).to(dtype))
    x, w = torch.randn(50, 70).to(dtype), torch.randn(70, 40).to(dtype)
    exact = x.double() @ w.double()
    assert_close(gemm(x, w, torch.float32), exact, torch.float32)
    assert_close(gemm(x, w), exact, dtype)


def test_a_float32_product_is_tf32_unless_told_otherwise():
    x, w = torch.randn(50, 70), torch.randn(70, 40)
    found = error(gemm(x, w), x.double() @ w.double()).norm
    assert LIMITS[torch.float32] < found < LIMITS[torch.float16]


def expected(operation, x):
    return {
        "add": lambda: x + x * 3,
        "divide": lambda: 1.0 / (x * x + 1.0),
        "negate": lambda: -x,
        "where": lambda: torch.where((x > 0.5) & (x < 1.5), x, torch.tensor(-1.0, dtype=x.dtype)),
        "fma": lambda: (x.double() * x.double() + x.double()).to(x.dtype),
        "maximum": lambda: x.clamp(min=0.25),
        "absolute": lambda: x.abs(),
        "exponential": lambda: x.float().exp().to(x.dtype),
        "half": lambda: x.half().to(x.dtype),
        "integer": lambda: x.int().to(x.dtype),
        "rounded": lambda: (x.float() * 1.0009765625).to(x.dtype),
        "scan": lambda: x.float().cumsum(0).to(x.dtype),
    }[operation]()


def tree_sum(x):
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


OPERATIONS = (
    *("add", "divide", "negate", "where", "fma", "maximum"),
    *("absolute", "exponential", "half", "integer", "rounded", "scan"),
)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_bfloat16_arithmetic_equals_that_of_torch(operation):
    x = torch.randn(64, generator=torch.Generator().manual_seed(3)).to(BF16)
    y, sums = torch.empty_like(x), torch.empty(4, dtype=BF16)
    launch(_elementwise, (1,), num_warps=4, x_ptr=x, y_ptr=y, sums_ptr=sums, OPERATION=operation, BLOCK=64)
    if operation == "scan":
        # The sums are added in another order.
        assert_close(y, expected(operation, x).double(), BF16)
    else:
        assert torch.equal(y, expected(operation, x))
    assert torch.equal(sums[:3], torch.stack([tree_sum(x), x.max(), x.min()]))
    assert_close(sums[3], x.double().sum(), BF16)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32], ids=str)
def test_casts_round_to_nearest_even(source):
    if source.is_floating_point:
        values = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-7, -1 - 2**-8 - 2**-10, 2**-20, 0.0, -0.0, torch.inf, -torch.inf]
        x = torch.tensor([*values, torch.nan, 60000.0, 3e-8, *torch.randn(20).tolist()]).to(source)
    else:
        x = torch.tensor([0, 1, -1, 257, 258, 259, 1 << 24, (1 << 24) + 1, -12345, 65535, *range(1000, 1022)]).to(
            source
        )
    y = torch.empty(32, dtype=BF16)
    launch(_cast, (1,), num_warps=4, x_ptr=x, y_ptr=y, BLOCK=32)
    assert torch.equal(y.nan_to_num(7.0), x.to(BF16).nan_to_num(7.0))
    assert torch.equal(y.isnan(), x.to(BF16).isnan())
    assert torch.equal(y.signbit()[~y.isnan()], x.to(BF16).signbit()[~y.isnan()])


PLANTED = """
import sys
import torch
sys.path.insert(0, {folder!r})
import test_arithmetic as t
x, w, y = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
t.launch(t._tile, (1,), num_warps=4, x_ptr=x, w_ptr=w, y_ptr=y, SIZE=16)
product = t.error(y, x.double() @ w.double()).norm
y = torch.empty(64, dtype=torch.bfloat16)
z = torch.randn(64) * 1.00390625
t.launch(t._cast, (1,), num_warps=4, x_ptr=z, y_ptr=y, BLOCK=64)
print(product > 0.1, torch.equal(y, z.bfloat16()))
"""


def test_without_the_repair_bfloat16_is_wrong():
    """If this fails, Triton has mended its interpreter, and the repair may go."""
    program = PLANTED.format(folder=str(Path(__file__).parent))
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert result.stdout.split() == ["True", "False"], result.stdout + result.stderr
