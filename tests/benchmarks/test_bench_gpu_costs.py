"""The costs on paper, against sums done by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks import costs
from benchmarks.methods import Cell
from peftk.testing.calls import KINDS, Call

T, D = 8192, 4096
BF16, F32 = torch.bfloat16, torch.float32


def test_block_rotate_by_hand() -> None:
    found = costs.cost(Call("block_rotate", T, D, D, 32, BF16), "triton")
    (step,) = found.steps
    assert step.triton
    # x in, y out, both bf16; 128 blocks of 32 x 32 in float32.
    assert found.bytes == 2 * T * D * 2 + 128 * 32 * 32 * 4
    assert found.flops == 2 * T * D * 32
    assert found.seconds == pytest.approx(134_742_016 / 4.3e12)


def test_block_rotate_linear_by_hand() -> None:
    out = 11008
    found = costs.cost(Call("block_rotate_linear", T, D, out, 64, BF16), "triton")
    rotate, product = sorted(found.steps, key=lambda step: not step.triton)
    assert (rotate.triton, product.name) == (True, "addmm")
    assert rotate.bytes == 2 * T * D * 2 + 64 * 64 * 64 * 4
    # bias, rotated x, weight, y.
    assert product.bytes == 2 * (out + T * D + out * D + T * out)
    assert product.flops == 2 * T * D * out
    assert found.flops == product.flops + 2 * T * D * 64
    assert found.seconds == pytest.approx(rotate.bytes / 4.3e12 + 2 * T * D * out / 790e12)


def test_plain_pytorch_by_hand() -> None:
    found = costs.cost(Call("low_rank_add", T, D, D, 16, F32), "torch")
    assert not any(step.triton for step in found.steps)
    products = [step for step in found.steps if step.flops]
    assert [step.flops for step in products] == [2 * T * D * 16] * 2
    assert products[0].bytes == 4 * (T * D + 16 * D + T * 16)


def test_accumulators_count_twice_and_views_not_at_all() -> None:
    a, b, c = (torch.empty(8, 8, device="meta") for _ in range(3))
    with costs._Calls() as seen:
        c.addmm_(a, b.mT)
        c.view(64).copy_(a.view(64))
        torch.empty_like(c).zero_()
        a[:1].expand(8, 8) + b
    assert [(step.name, step.bytes // 32) for step in seen.steps] == [
        ("addmm_", 8 * 4),
        ("copy_", 8 * 2),
        ("zero_", 8),
        ("add", 8 * 3),
    ]
    assert [step.flops for step in seen.steps] == [2 * 8**3, 0, 0, 0]


def test_a_backend_that_cannot_run_has_a_reason_and_no_figures() -> None:
    found = costs.cost(Call("cayley", 0, 64, 64, 32, F32, "exact"), "triton")
    assert found.reason and not found.steps


def test_a_layer_is_the_sum_of_its_operators() -> None:
    found = costs.layer_cost(Cell("lokr", 8, D, T, BF16, BF16), "triton")
    one, two = (costs.cost(Call(f"kronecker_linear{s}", T, D, D, 8, BF16), "triton") for s in ("", "_backward"))
    parts = {part.name: part for part in found.parts}
    assert [part.bytes for part in (parts["kronecker_linear"], parts["kronecker_linear_backward"])] == [
        one.bytes,
        two.bytes,
    ]
    # Beside the operators there are casts of the factors.
    assert 0 <= found.bytes - one.bytes - two.bytes < 16 * (D // 8) ** 2
    assert found.flops == one.flops + two.flops
    assert found.seconds == pytest.approx(one.seconds + two.seconds, rel=0.01)
    assert found.overhead == pytest.approx(found.seconds * 790e12 / (4 * T * D * D) - 1)
    assert not found.stand_ins


def test_products_below_autograd_are_counted() -> None:
    """`linear` arrives whole there, and torch has no formula for it, nor for `addmm_`."""
    for backend, name in (("torch", "lora"), ("triton", "lora"), ("triton", "c3a")):
        found = costs.layer_cost(Cell(name, 16, D, T, BF16, BF16), backend)
        products = [step for step in found.steps if step.flops == 2 * T * D * D]
        assert len(products) == 2 and not any(step.triton for step in products)
        assert found.overhead > 0


def test_torch_stands_in_for_what_a_backend_cannot_run() -> None:
    found = costs.layer_cost(Cell("boft", 4, D, T, BF16, BF16), "triton")
    assert found.stand_ins == "cayley"
    assert {part.backend for part in found.parts if part.name.startswith("butterfly")} == {"triton"}


def test_tables_claim_no_time() -> None:
    layers, table = costs.tables()
    assert len(layers.rows) == 2 * len(costs.cells())
    assert len(table.rows) == 2 * len(list(costs.calls()))
    assert all(len(row) == len(shown.header) for shown in (layers, table) for row in shown.rows)
    assert all(row[-1] == "not measured" or row[-1].startswith("cannot run: ") for row in table.rows)
    assert {row[-1] for row in layers.rows} == {"not measured"}
    assert all(row[6].startswith("+") and not row[6].startswith("+-") for row in layers.rows)
    targets = {row[0]: row[7] for row in layers.rows}
    assert (targets["LoHa r8"], targets["C3A b128"], targets["DoRA r16"]) == ("+12 %", "+15 %", "")
    able = [row for row in table.rows if row[1] == "triton" and row[-1] == "not measured"]
    operators = {row[0].partition("-")[0].removesuffix("_backward") for row in able}
    # What no layer calls at these sizes is left out.
    assert operators == set(KINDS) - {"butterfly_multiply", "circular_conv"}
    assert any(row[6].startswith("+") for row in able)


def test_every_launch_can_be_listed(capsys: pytest.CaptureFixture) -> None:
    costs.main(["--steps", "scale_channels-T8192-4096-b4-bf16"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if ", triton " in line]
    assert "scale_channels_kernel" in line and "128.02 MiB" in line and "31.2 us" in line
