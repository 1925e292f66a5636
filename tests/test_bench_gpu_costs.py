"""The costs on paper, against sums done by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks import costs
from peftk.testing.calls import Call

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


def test_a_backend_that_cannot_run_has_a_reason_and_no_figures() -> None:
    found = costs.cost(Call("cayley", 0, 64, 64, 32, F32, "exact"), "triton")
    assert found.reason and not found.steps


def test_table_claims_no_time() -> None:
    (table,) = costs.tables()
    assert len(table.rows) == 2 * len(list(costs.calls()))
    assert all(len(row) == len(table.header) for row in table.rows)
    assert all(row[-1] == "not measured" or row[-1].startswith("cannot run: ") for row in table.rows)
    able = [row for row in table.rows if row[1] == "triton" and row[-1] == "not measured"]
    families = {row[0].partition("-")[0].removesuffix("_backward") for row in able}
    assert families == {"block_rotate", "block_rotate_linear", "cayley", "low_rank_add", "low_rank_linear"}
    assert any(row[6].startswith("+") for row in able)
