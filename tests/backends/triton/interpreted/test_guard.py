"""Planted errors that the guarded interpreter must find, and correct kernels that it must leave alone."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from peftk.triton_kernels._launch import launch
from triton.tools.tensor_descriptor import TensorDescriptor

from peftk.testing.triton_interpreter import RaceError


@triton.jit
def _copy(x_ptr, y_ptr, rows, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows) & (column < columns)
    tl.store(y_ptr + row * stride + column, tl.load(x_ptr + row * stride + column, mask=mask), mask=mask)


@triton.jit
def _copy_by_descriptor(x_ptr, y_ptr, rows, read_rows, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [read_rows, 16], [16, 1], [BLOCK, 16])
    y = tl.make_tensor_descriptor(y_ptr, [rows, 16], [16, 1], [BLOCK, 16])
    first = tl.program_id(0) * BLOCK
    y.store([first, 0], x.load([first, 0]))


@triton.jit
def _copy_host_descriptor(x, y, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    y.store([first, 0], x.load([first, 0]))


@triton.jit
def _overlapping_rows(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [16, 16], [16, 1], [BLOCK, 16])
    y = tl.make_tensor_descriptor(y_ptr, [16, 16], [16, 1], [BLOCK, 16])
    y.store([tl.program_id(0) * (BLOCK - 1), 0], x.load([tl.program_id(0) * BLOCK, 0]))


@triton.jit
def _shift_in_place(x_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + index, tl.load(x_ptr + index + 1))


@triton.jit
def _same_address(y_ptr, same_value: tl.constexpr):
    lane = tl.arange(0, 16)
    tl.store(y_ptr + lane // 2, 1 if same_value else lane)


@triton.jit
def _histogram(x_ptr, counts_ptr, n, offset, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    tl.atomic_add(counts_ptr + offset + tl.load(x_ptr + index, mask=mask, other=0), 1, mask=mask)


def copy(x, y, *, rows=None, columns=None, grid=None, stride=None):
    rows = x.shape[0] if rows is None else rows
    columns = x.shape[1] if columns is None else columns
    stride = x.stride(0) if stride is None else stride
    arguments = {"x_ptr": x, "y_ptr": y, "rows": rows, "columns": columns, "stride": stride}
    launch(_copy, (grid or rows,), num_warps=4, **arguments, BLOCK=128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_correct_kernels_are_clean(dtype):
    x = torch.randn(7, 13).to(dtype)
    y = torch.full_like(x, torch.nan)
    copy(x, y, grid=8)
    assert torch.equal(x, y)


def test_views_are_written_through():
    whole = torch.full((9, 20), torch.nan)
    x = torch.randn(9, 20)
    copy(x[1:8, 3:16], whole[1:8, 3:16])
    assert torch.equal(whole[1:8, 3:16], x[1:8, 3:16])
    assert whole.isnan().sum() == 9 * 20 - 7 * 13


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rows": 8}, "load of 4 bytes lie outside every argument; the first starts 0 bytes behind the end of x_ptr"),
        ({"rows": 7, "grid": 1, "columns": 92}, r"1 of 92 lanes .* end of x_ptr \(arguments: x_ptr 364 bytes, y_ptr"),
        ({"rows": 8, "stride": -13}, "52 bytes before x_ptr"),
    ],
    ids=["row", "column", "before"],
)
def test_out_of_bounds_load_is_caught(wrong, named):
    x = torch.randn(7, 13)
    with pytest.raises(IndexError, match=named):
        copy(x, torch.empty_like(x), **wrong)


def test_out_of_bounds_store_is_caught():
    with pytest.raises(IndexError, match=r"_copy, program \(6, 0, 0\): 13 of 13 lanes of a store .* behind .* y_ptr"):
        copy(torch.randn(7, 13), torch.empty(6, 13))


def test_reading_the_rest_of_a_storage_is_caught():
    """A view ends where its elements end, even if its storage goes on."""
    with pytest.raises(IndexError, match="behind the end of x_ptr"):
        copy(torch.randn(8, 13)[:7], torch.empty(8, 13), rows=8)


def test_out_of_bounds_descriptor_is_caught():
    x, y = torch.randn(12, 16), torch.empty(12, 16)
    arguments = {"x_ptr": x, "y_ptr": y, "rows": 12, "BLOCK": 8}
    launch(_copy_by_descriptor, (2,), num_warps=4, **arguments, read_rows=12)
    assert torch.equal(x, y)
    with pytest.raises(IndexError, match=r"16 of 80 lanes of a load of 4 bytes .* behind the end of x_ptr"):
        launch(_copy_by_descriptor, (2,), num_warps=4, **arguments, read_rows=13)
    with pytest.raises(IndexError, match=r"store of 4 bytes .* behind the end of y_ptr"):
        launch(_copy_by_descriptor, (2,), num_warps=4, **{**arguments, "rows": 13}, read_rows=12)


def test_out_of_bounds_host_descriptor_is_caught():
    x, y = torch.randn(12, 16), torch.empty(12, 16)

    def described(tensor, rows):
        return TensorDescriptor(tensor, [rows, 16], [16, 1], [8, 16])

    _copy_host_descriptor[(2,)](x=described(x, 12), y=described(y, 12), BLOCK=8)
    assert torch.equal(x, y)
    with pytest.raises(IndexError, match="behind the end of x"):
        _copy_host_descriptor[(2,)](x=described(x, 13), y=described(y, 12), BLOCK=8)


def test_two_programs_storing_to_one_address_are_caught():
    x = torch.randn(7, 13)
    with pytest.raises(RaceError, match="store of 13 lanes races with another program's store to the same address"):
        copy(x, torch.empty_like(x), stride=0, columns=13)
    x, y = torch.randn(16, 16), torch.empty(16, 16)
    with pytest.raises(RaceError, match=r"_overlapping_rows, program \(1, 0, 0\): the store of 16 lanes"):
        launch(_overlapping_rows, (2,), num_warps=4, x_ptr=x, y_ptr=y, BLOCK=8)


def test_a_load_where_another_program_stores_is_caught():
    with pytest.raises(RaceError, match="races with another program's load from the same address"):
        launch(_shift_in_place, (2,), num_warps=4, x_ptr=torch.randn(65), BLOCK=32)
    launch(_shift_in_place, (1,), num_warps=4, x_ptr=torch.randn(65), BLOCK=32)


def test_lanes_that_disagree_are_caught():
    y = torch.zeros(8, dtype=torch.int32)
    launch(_same_address, (1,), num_warps=4, y_ptr=y, same_value=True)
    assert y.eq(1).all()
    with pytest.raises(RaceError, match="lanes of one store write different values"):
        launch(_same_address, (1,), num_warps=4, y_ptr=y, same_value=False)


def test_atomics_may_meet_but_stay_inside():
    x = torch.randint(0, 4, (100,), dtype=torch.int32)
    counts = torch.zeros(4, dtype=torch.int32)
    launch(_histogram, (4,), num_warps=4, x_ptr=x, counts_ptr=counts, n=100, offset=0, BLOCK=32)
    assert torch.equal(counts, torch.bincount(x, minlength=4).int())
    with pytest.raises(IndexError, match="of an atomic"):
        launch(_histogram, (4,), num_warps=4, x_ptr=x, counts_ptr=counts, n=100, offset=4, BLOCK=32)


def test_a_launch_that_failed_changes_nothing():
    x, y = torch.randn(7, 13), torch.zeros(6, 13)
    with pytest.raises(IndexError):
        copy(x, y)
    assert not y.any()
