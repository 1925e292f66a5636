"""Rows sorted by group: what offsets may be, and that the order of a sort is the caller's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import peftk
from peftk.testing.cases.grouped_low_rank import add
from peftk.testing.compare import assert_close, assert_same_bits

F = peftk.functional
X, BASE = torch.randn(6, 4), torch.randn(6, 5)
A, B = torch.randn(3, 2, 4), torch.randn(3, 5, 2)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(
    ("offsets", "got"),
    [
        ([2, 1, 6], "got 1 for group 1, which starts at row 2"),
        ([2, 4, 7], "got 7 for group 2, which starts at row 4"),
        ([-1, 4, 6], "got -1 for group 0, which starts at row 0"),
        ([2**62, 4, 6], "got 4611686018427387904 for group 0"),
    ],
)
def test_offsets_that_do_not_ascend_or_exceed_the_rows(backend: str, offsets: list[int], got: str) -> None:
    x = X.clone().requires_grad_()
    said = pytest.raises(ValueError, match=rf"^offsets: expected .* at most 6, the rows of x; {got}")
    with peftk.use_backend(backend), said:
        F.grouped_low_rank_add(BASE, x, A, B, torch.tensor(offsets))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"offsets": torch.tensor([1.0, 2.0, 3.0])},
            TypeError,
            "offsets: expected dtype int64 or int32; got torch.flo",
        ),
        ({"offsets": torch.tensor([1, 2, 3], dtype=torch.int16)}, TypeError, "offsets: expected dtype int64 or int32"),
        ({"offsets": torch.tensor([1, 2])}, ValueError, r"offsets: expected shape \(groups,\) = \(3\); got \(2,\)"),
        ({"offsets": [1, 2, 3]}, TypeError, "offsets: expected a torch.Tensor; got list"),
        ({"a": A[:, :0], "b": B[..., :0]}, ValueError, "a: expected shape .* with groups, rank >= 1; got"),
        ({"a": A[:0], "b": B[:0]}, ValueError, "a: expected shape .* with groups, rank >= 1; got"),
        ({"a": A.long()}, TypeError, "a: expected dtype float64.*; got torch.int64"),
        ({"a": A[0]}, ValueError, "a: expected shape"),
        ({"b": B.mT}, ValueError, r"b: expected shape \(groups, out_features, rank\)"),
        ({"b": B[:2]}, ValueError, r"b: expected shape \(groups, out_features, rank\)"),
        ({"x": X[None]}, ValueError, r"x: expected 2 dimensions, \(rows, in_features\)"),
        ({"base": BASE[:5]}, ValueError, "base: expected shape"),
        ({"gate": torch.ones(2)}, ValueError, r"gate: expected shape \(rows, rank\) = \(6, 2\)"),
        ({"scale": torch.ones(2)}, ValueError, r"scale: expected a number, or a tensor of shape \(\) or \(groups,\)"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
    ],
)
def test_wrong_arguments(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"base": BASE, "x": X, "a": A, "b": B, "offsets": torch.tensor([2, 2, 6]), **change}
    with pytest.raises(error, match=message):
        F.grouped_low_rank_add(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(3, 5, 4).requires_grad_()}, ValueError, "weight: expected"),
        ({"weight": torch.ones(3, 4, 5)}, ValueError, r"weight: expected shape \(groups, out_features, in_features\)"),
        ({"weight": torch.ones(2, 5, 4)}, ValueError, "weight: expected shape"),
        ({"weight": torch.ones(3, 5, 4).long()}, TypeError, "weight: expected dtype"),
        ({"x": X[0]}, ValueError, "x: expected 2 dimensions"),
        ({"a": A[:2]}, ValueError, "b: expected shape"),
        ({"offsets": torch.tensor([2, 1, 6])}, ValueError, "offsets: expected .*got 1 for group 1"),
        ({"offsets": torch.tensor([2, 2, 7])}, ValueError, "offsets: expected .*got 7 for group 2"),
    ],
)
def test_wrong_arguments_beside_frozen_weights(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": X, "weight": torch.ones(3, 5, 4), "a": A, "b": B, "offsets": torch.tensor([2, 2, 6]), **change}
    with pytest.raises(error, match=message):
        F.grouped_low_rank_linear(**arguments)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("transposed", [False, True])
def test_frozen_weights_of_any_strides_and_dtype(backend: str, transposed: bool) -> None:
    weight = torch.randn(3, 4, 5).mT if transposed else torch.randn(3, 5, 4)
    offsets = torch.tensor([2, 2, 5])
    with peftk.use_backend(backend):
        found = F.grouped_low_rank_linear(X, weight.half(), A, B, offsets, 0.5)
    base = torch.cat([X[:2] @ weight[0].half().float().mT, X[2:5] @ weight[2].half().float().mT, torch.zeros(1, 5)])
    assert_close(found, add(*(t.double() for t in (base, X, A, B)), offsets, 0.5), torch.float32)


def test_raw_operators_check_before_they_touch_memory() -> None:
    native, x = torch.ops.peftk_native, X
    good = [BASE, x, A, B, torch.tensor([2, 2, 6]), None, 1.0, torch.empty(6, 5), torch.empty(6, 2)]
    native.grouped_low_rank(*good)
    for place, bad in [
        (0, BASE[:5]),
        (1, x.double()),
        (2, A[:2]),
        (2, A.mT),
        (3, B.bfloat16()),
        (4, torch.tensor([2, 1, 6])),
        (4, torch.tensor([2, 2, 7])),
        (4, torch.tensor([2, 2, 6], dtype=torch.int32)),
        (5, torch.ones(2)),
        (7, torch.empty(6, 4)),
        (8, torch.empty(5, 2)),
    ]:
        with pytest.raises(RuntimeError, match="expected"):
            native.grouped_low_rank(*good[:place], bad, *good[place + 1 :])


def routed(x: Tensor, choice: Tensor, a: Tensor, b: Tensor, backwards: bool) -> Tensor:
    """Send the rows of x to the groups that are chosen for them, sorted one way or the other, and put them back."""
    order = torch.argsort(choice, stable=True)
    if backwards:
        # Any order inside of the groups is right.
        order = order.flip(0)[torch.argsort(choice[order.flip(0)], stable=True)]
    offsets = torch.bincount(choice, minlength=len(a)).cumsum(0)
    y = F.grouped_low_rank_add(torch.zeros(len(x), b.shape[1]).to(x), x[order], a, b, offsets)
    return torch.zeros_like(y).index_copy(0, order, y)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_row_keeps_its_token_through_two_products(backend: str) -> None:
    """The second product of an expert takes the rows as the first one left them, whatever the sort was."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    choice = torch.randint(0, 5, (40,), generator=generator)
    up = torch.randn(5, 3, 6, generator=generator), torch.randn(5, 8, 3, generator=generator)
    down = torch.randn(5, 3, 8, generator=generator), torch.randn(5, 6, 3, generator=generator)
    (up_a, up_b), (down_a, down_b) = ([f.double() for f in pair] for pair in (up, down))
    truth = torch.stack(
        [down_b[g] @ down_a[g] @ torch.tanh(up_b[g] @ up_a[g] @ row) for row, g in zip(x, choice, strict=True)]
    )
    dtype = torch.float64 if backend == "torch" else torch.float32
    with peftk.use_backend(backend):
        found = []
        for backwards in (False, True):
            hidden = torch.tanh(routed(x.to(dtype), choice, up_a, up_b, backwards))
            found.append(routed(hidden, choice, down_a, down_b, not backwards))
    for y in found:
        assert_close(y, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_change_no_bit(dtype: torch.dtype) -> None:
    base, x = BASE.to(dtype), X.to(dtype)
    for backend in ("torch", "native"):
        with peftk.use_backend(backend):
            y = F.grouped_low_rank_add(base, x, A, torch.zeros_like(B), torch.tensor([2, 2, 5]), 2.0)
        assert_same_bits(y, base)


def test_each_group_is_what_it_is_alone() -> None:
    offsets = torch.tensor([1, 20, 20, 50])
    generator = torch.Generator().manual_seed(0)
    x, base = torch.randn(52, 24, generator=generator), torch.randn(52, 16, generator=generator)
    a, b = torch.randn(4, 8, 24, generator=generator), torch.randn(4, 16, 8, generator=generator)
    y = F.grouped_low_rank_add(base, x, a, b, offsets, 0.5)
    assert_close(y, add(*(t.double() for t in (base, x, a, b)), offsets, 0.5), torch.float32)
    for group, (start, end) in enumerate([(0, 1), (1, 20), (20, 20), (20, 50)]):
        alone = F.low_rank_add(base[start:end], x[start:end], a[group], b[group], 0.5)
        assert_close(y[start:end], alone.double(), torch.float32)
