"""Products of half-precision matrices whose sums stay float32: in plain loops, in matrix instructions, and widened."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from peftk.kernels import native as native_kernels
from peftk.kernels.shared import wide
from peftk.testing.compare import LIMITS, assert_same_bits

pytestmark = pytest.mark.skipif(native_kernels.unavailable() is not None, reason=str(native_kernels.unavailable()))

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Whole tiles and parts of them, several parts of the depth, several tasks of rows and of columns, and thin ones.
SHAPES = [(1, 1, 1), (16, 32, 16), (5, 7, 3), (17, 33, 18), (70, 600, 150), (33, 1, 40), (300, 64, 530), (1024, 96, 16)]


def has_instructions() -> bool:
    from peftk import _C

    return _C.has_bfloat16_tiles()


def matrix(rows: int, columns: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    # Of one sign: sums that were rounded on the way would be off by as much as they are large.
    t = torch.rand((columns, rows) if transposed else (rows, columns)).to(dtype)
    return t.mT if transposed else t


def worst(found: Tensor, a: Tensor, b: Tensor) -> float:
    truth = a.double() @ b.double()
    return ((found.double() - truth).abs() / truth.abs().clamp_min(1e-300)).max().item()


def native(a: Tensor, b: Tensor, instructions: bool) -> Tensor:
    out = torch.full((a.shape[0], b.shape[1]), float("nan"))
    torch.ops.peftk_native.wide_product(a, b, instructions, out)
    return out


@pytest.fixture(params=[False, True], ids=["plain", "instructions"])
def instructions(request: pytest.FixtureRequest) -> bool:
    if request.param and not has_instructions():
        pytest.skip("this CPU has no AMX for bfloat16, or the system keeps it from this process")
    return request.param


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, F32), (F32, BF16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_float32(shape, dtypes, instructions):
    rows, depth, columns = shape
    for of_a, of_b in itertools.product((False, True), repeat=2):
        a, b = matrix(rows, depth, of_a, dtypes[0]), matrix(depth, columns, of_b, dtypes[1])
        assert worst(native(a, b, instructions), a, b) <= LIMITS[F32]


@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16), (BF16, F32), (F32, BF16), (F16, F16), (F32, F32), (F64, F64)], ids=str
)
def test_every_dtype_takes_a_way(dtypes):
    from peftk.kernels.native.wide_product import wide_product

    a, b = matrix(48, 500, True, dtypes[0]), matrix(500, 40, False, dtypes[1])
    found = wide_product(a, b)
    assert found.dtype is (F64 if F64 in dtypes else F32)
    limit = LIMITS[found.dtype]
    assert worst(found, a, b) <= limit
    # Neither stride is 1.
    assert worst(wide_product(a[::2, ::3], b[::3, ::2]), a[::2, ::3], b[::3, ::2]) <= limit


def test_empty_depths_give_zeros(instructions):
    assert native(torch.ones(3, 0, dtype=BF16), torch.ones(0, 4, dtype=BF16), instructions).count_nonzero() == 0
    assert native(torch.ones(0, 3, dtype=BF16), torch.ones(3, 4, dtype=BF16), instructions).shape == (0, 4)


@pytest.mark.parametrize("shape", [(1024, 600, 16), (16, 600, 1024), (300, 600, 300)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape, instructions):
    rows, depth, columns = shape
    a, b = matrix(rows, depth, True, BF16), matrix(depth, columns, False, BF16)
    expected, threads = native(a, b, instructions), torch.get_num_threads()
    try:
        for other in (1, 2, 3):
            torch.set_num_threads(other)
            assert_same_bits(native(a, b, instructions), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_what_is_not_finite_stays_in_its_row_and_is_not_lost(dtype, value, instructions):
    for transposed in (False, True):
        a, b = matrix(40, 70, transposed, dtype), matrix(70, 33, False, BF16)
        before = native(a, b, instructions)
        a[17, 5] = value
        found = native(a, b, instructions)
        assert torch.equal(found[17], a[17].float() @ b.float()) or (found[17].isnan().all() and value != value)
        kept = torch.arange(40) != 17
        assert_same_bits(found[kept], before[kept])


def test_what_it_refuses():
    a, b, out = torch.ones(4, 6, dtype=BF16), torch.ones(6, 5, dtype=BF16), torch.empty(4, 5)
    product = torch.ops.peftk_native.wide_product
    with pytest.raises(RuntimeError, match="a, b: expected one of them in bfloat16"):
        product(a.float(), b.float(), False, out)
    with pytest.raises(RuntimeError, match="b: expected 6 rows, as a has columns; got 5"):
        product(a, b[:5], False, out)
    with pytest.raises(RuntimeError, match="a: expected a stride of 1; got 12 and 2"):
        product(torch.ones(4, 12, dtype=BF16)[:, ::2], b, False, out)
    with pytest.raises(RuntimeError, match=r"out: expected shape \(4, 5\)"):
        product(a, b, False, out.mT.contiguous())
    with pytest.raises(RuntimeError, match="a: expected dtype float32 or bfloat16"):
        product(a.half(), b, False, out)
    if not has_instructions():
        with pytest.raises(RuntimeError, match="instructions: expected a CPU with AMX and bfloat16"):
            product(a, b, True, out)


def test_the_rule_says_what_is_multiplied_as_it_is(monkeypatch):
    from peftk.kernels.native import wide_product as module

    monkeypatch.setattr(module, "INSTRUCTIONS", False)
    monkeypatch.setattr(module, "_product", None)
    a, b = matrix(80, 90, True, BF16), matrix(90, 8, False, BF16)
    assert not module.narrow(a) and worst(module.wide_product(a, b), a, b) <= LIMITS[F32]
    assert torch.equal(module.wide_product(a, b), wide.wide_product(a, b))
