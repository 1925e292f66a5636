"""The short way for few rows that record nothing: right where it runs, and out of the way elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import peftk
from peftk.ops._few_rows import FEW, low_rank_few, rescaled_rows, rotated_few
from peftk.ops.plain import unobserved
from peftk.testing.compare import assert_close, assert_same_bits

OUT, FEATURES = 37, 83


def arguments(rows: int, rank: int, dtype: torch.dtype, gated: bool = False) -> list[Tensor | float | None]:
    generator = torch.Generator().manual_seed(rows + rank)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return [
        *(drawn(rows, FEATURES, dtype=dtype), drawn(OUT, FEATURES, dtype=dtype), drawn(OUT, dtype=dtype)),
        *(drawn(rank, FEATURES), drawn(OUT, rank), 0.75, drawn(rank) if gated else None),
    ]


def formula(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scale: float, gate: Tensor | None) -> Tensor:
    x, weight, bias, a, b = (t.double() for t in (x, weight, bias, a, b))
    hidden = x @ a.T if gate is None else x @ a.T * gate.double()
    return x @ weight.T + bias + scale * hidden @ b.T


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 19])
@pytest.mark.parametrize("rows", [1, 4, 5, 8, 16, 24, FEW])
def test_matches_float64(rows: int, rank: int, dtype: torch.dtype, gated: bool) -> None:
    args = arguments(rows, rank, dtype, gated)
    with torch.no_grad():
        found = low_rank_few(*args)
    assert found is not None and found.dtype is dtype
    assert_close(found, formula(*args), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", range(1, 12))
def test_one_pass_takes_rows_in_tiles_of_any_number(rows: int, dtype: torch.dtype) -> None:
    few_rows = pytest.importorskip("peftk.kernels.native.few_rows")
    args = arguments(rows, 5, dtype, gated=True)
    x, weight, bias, a, b, scale, gate = args
    assert_close(few_rows.low_rank(x, weight, bias, a, b, gate, scale, rows), formula(*args), dtype)
    assert few_rows.low_rank(x, weight, bias, a, b, gate, scale, rows - 1) is None
    found = few_rows.low_rank(x, weight, None, a, b, None, scale, rows)
    sums, gain, copies = few_rows.row_sums(weight), torch.ones(OUT), (a.clone(), b.clone())
    again = few_rows.rescale(x, weight, None, a, b, scale, gain, sums, (a, b), copies, rows)
    assert_same_bits(again, found)
    a[0, 0] += 1
    assert few_rows.rescale(x, weight, None, a, b, scale, gain, sums, (a, b), copies, rows) is None
    a[0, 0] = copies[0][0, 0]
    weight[OUT - 2, 3] += 1
    assert few_rows.rescale(x, weight, None, a, b, scale, gain, sums, (a, b), copies, rows) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 11, 16])
def test_what_is_added_is_rounded_once_in_every_lane(rows: int, dtype: torch.dtype) -> None:
    few_rows = pytest.importorskip("peftk.kernels.native.few_rows")
    generator = torch.Generator().manual_seed(rows)
    x, out = (torch.randn(rows, width, generator=generator).to(dtype) for width in (9, 21))
    a, b = torch.eye(1, 9), torch.randn(21, 1, generator=generator)
    limits = torch.finfo(dtype)
    out[-1, :5] = torch.tensor([torch.inf, -torch.inf, torch.nan, limits.max, limits.tiny])
    # One product and one sum: the order of nothing is open. Halves of the last place are ties.
    b[5:9], x[:, 0] = 2.0**-9, 1.0
    out[:, 5:9] = torch.tensor([1.0, 1.0 + limits.eps, -1.0, 3.0])
    expected = (out.float() + x[:, :1].float() * b.mT).to(dtype)
    few_rows._low_rank(x, a, b, None, 1.0, None, None, out)
    assert out.isnan().equal(expected.isnan())
    assert_same_bits(out.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 17, FEW])
def test_sums_are_scaled_about_the_bias(rows: int, dtype: torch.dtype, biased: bool) -> None:
    pytest.importorskip("peftk.kernels.native.few_rows")
    x, weight, bias, a, b, scale, _ = arguments(rows, 5, dtype, gated=False)
    gain = torch.rand(OUT, generator=torch.Generator().manual_seed(1)) + 0.5
    found = rescaled_rows(x, weight, bias if biased else None, a, b, scale, gain)
    expected = gain.double() * formula(x, weight, torch.zeros(OUT), a, b, scale, None)
    assert found is not None and found.dtype is dtype
    assert_close(found, expected + bias.double() if biased else expected, dtype)
    # What is the frozen layer's alone, and what does not fit, is left to others.
    assert rescaled_rows(x, weight, bias, a, torch.zeros_like(b), scale, gain) is None
    assert rescaled_rows(x, weight, bias, a, b, scale, gain[1:]) is None
    assert rescaled_rows(x, weight, bias, a[:, 1:], b, scale, gain) is None
    assert rescaled_rows(x, weight, bias.double(), a, b, scale, gain) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_is_not_finite_changes_no_other(dtype: torch.dtype) -> None:
    x, *others = arguments(4, 5, dtype)
    marred = x.clone()
    marred[2, 7] = torch.nan
    with torch.no_grad():
        clean, found = low_rank_few(x, *others), low_rank_few(marred, *others)
    assert found[2].isnan().all()
    kept = torch.tensor([0, 1, 3])
    assert_same_bits(found[kept], clean[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_what_adds_nothing_keeps_the_bits_of_the_frozen_layer(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias, a, b, scale, _ = arguments(rows, 5, dtype)
    frozen = torch.nn.functional.linear(x, weight, bias)
    with torch.no_grad():
        for zero in (0.0, -0.0):
            assert_same_bits(low_rank_few(x, weight, bias, a, torch.full_like(b, zero), scale, None), frozen)
        assert_same_bits(low_rank_few(x, weight, bias, a, b, 0.0, None), frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_and_biases_of_other_layouts(dtype: torch.dtype) -> None:
    x, weight, bias, *others = arguments(2, 5, dtype)
    truth = formula(x, weight, bias, *others)
    with torch.no_grad():
        for w in (weight, weight.T.contiguous().T):
            for added in (bias, bias.repeat_interleave(2)[::2]):
                assert_close(low_rank_few(x, w, added, *others), truth, dtype)
            assert_close(low_rank_few(x, w, None, *others), truth - bias.double(), dtype)


def test_leading_dimensions_and_strided_tensors() -> None:
    x, weight, bias, a, b, scale, _ = arguments(6, 5, torch.float32)
    with torch.no_grad():
        found = low_rank_few(x.view(2, 3, FEATURES), weight, bias, a, b, scale, None)
        assert found.shape == (2, 3, OUT)
        assert low_rank_few(x, weight, bias, a.T.contiguous().T, b, scale, None) is None
        assert low_rank_few(x[:, ::1].T.contiguous().T, weight, bias, a, b, scale, None) is None


class _Listening(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "listen",
    [
        torch.enable_grad,
        _Listening,
        _Dispatching,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: peftk.use_backend("torch"),
        torch.autograd.forward_ad.dual_level,
        torch.profiler.profile,
    ],
)
def test_gives_way_to_whoever_listens(listen: Callable[[], contextlib.AbstractContextManager]) -> None:
    with torch.no_grad():
        assert unobserved()
        with listen():
            assert not unobserved()
        found = torch.func.vmap(lambda x: x.sum() if unobserved() else torch.zeros(()))(torch.ones(1, 2))
    assert (found == 0).all()


@pytest.mark.parametrize(
    "changed",
    [
        {0: lambda x: x.double()},
        {0: lambda x: x.half()},
        {0: lambda x: x[:0]},
        {0: lambda x: x.expand(FEW + 1, -1).contiguous()},
        {3: lambda a: a.bfloat16()},
        {3: lambda a: a[:, 1:].contiguous()},
        {4: lambda b: b[1:]},
        {5: lambda scale: torch.tensor(scale)},
        {6: lambda gate: torch.ones(2, 5)},
    ],
    ids=lambda changed: f"argument{next(iter(changed))}",
)
def test_leaves_everything_else_to_the_operators(changed: dict[int, Callable]) -> None:
    args = arguments(1, 5, torch.float32)
    args = [changed[i](value) if i in changed else value for i, value in enumerate(args)]
    with torch.no_grad():
        assert low_rank_few(*args) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 16, FEW + 1])
def test_layers_generate_what_they_were_trained_to(rows: int, dtype: torch.dtype) -> None:
    for config in (peftk.LoraConfig(r=5, init_lora_weights=False), peftk.AdaLoraConfig(init_r=5, total_step=9)):
        torch.manual_seed(1)
        kind = peftk.nn.LoRALinear if isinstance(config, peftk.LoraConfig) else peftk.nn.AdaLoRALinear
        layer = kind(torch.nn.Linear(FEATURES, OUT).to(dtype), config).eval()
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=0.3)
        x = torch.randn(rows, FEATURES).to(dtype)
        with torch.no_grad():
            short = layer(x)
        recorded = layer(x)
        assert recorded.requires_grad and not short.requires_grad
        assert_close(short, recorded.detach().double(), dtype)


def rotation(size: int, rows: int, dtype: torch.dtype, shared: bool = False) -> list[Tensor]:
    features = size * 5
    generator = torch.Generator().manual_seed(rows + size)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return [
        *(drawn(rows, features, dtype=dtype), drawn(OUT, features, dtype=dtype), drawn(OUT, dtype=dtype)),
        *(drawn(1 if shared else 5, size, size), drawn(OUT)),
    ]


def rotated(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, gain: Tensor | None) -> Tensor:
    turn = torch.block_diag(*blocks.double().expand(5, -1, -1))
    y = x.double() @ turn @ weight.double().T
    y = y if gain is None else y * gain.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 3, 8, 12, 32, 44])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_rotated_rows_match_float64(rows: int, size: int, dtype: torch.dtype) -> None:
    for shared in (False, True):
        x, weight, bias, blocks, gain = rotation(size, rows, dtype, shared)
        with torch.no_grad():
            for b, g in ((bias, gain), (None, None)):
                found = rotated_few(x, weight, b, blocks, g)
                assert found is not None and found.dtype is dtype
                assert_close(found, rotated(x, weight, b, blocks, g), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rotated_row_that_is_not_finite_changes_no_other(dtype: torch.dtype) -> None:
    x, *others = rotation(8, 4, dtype)
    marred = x.clone()
    marred[2, 7] = torch.inf
    with torch.no_grad():
        clean, found = rotated_few(x, *others), rotated_few(marred, *others)
    assert not found[2].isfinite().any()
    kept = torch.tensor([0, 1, 3])
    assert_same_bits(found[kept], clean[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotations_that_change_nothing_and_what_does_not_fit_are_left_to_the_operators(dtype: torch.dtype) -> None:
    x, weight, bias, blocks, gain = rotation(8, 2, dtype)
    eye = torch.eye(8).expand(5, 8, 8).contiguous()
    many = x.expand(FEW + 1, 2, -1)[:, 0].contiguous()
    with torch.no_grad():
        assert rotated_few(x, weight, bias, blocks, gain) is not None
        for unfit in (eye, eye[:1], blocks[:4], blocks[:, :7], blocks[:, 1:, 1:], blocks.double(), blocks.mT):
            assert rotated_few(x, weight, bias, unfit, gain) is None
        assert rotated_few(x, weight, bias, blocks, gain[1:]) is None
        assert rotated_few(x.double(), weight.double(), bias.double(), blocks, gain) is None
        assert rotated_few(many, weight, bias, blocks, gain) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_rotating_layers_generate_what_they_were_trained_to(rows: int, dtype: torch.dtype) -> None:
    configs = [
        (peftk.nn.OFTLinear, peftk.OFTConfig(oft_block_size=8, use_cayley_neumann=True)),
        (peftk.nn.OFTLinear, peftk.OFTConfig(oft_block_size=8, use_cayley_neumann=False, block_share=True)),
        (peftk.nn.BOFTLinear, peftk.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2)),
    ]
    for kind, config in configs:
        torch.manual_seed(1)
        base = torch.nn.Linear(64, OUT).to(dtype)
        layer = kind(base, config).eval()
        x = torch.randn(rows, 64).to(dtype)
        with torch.no_grad():
            assert_same_bits(layer(x), base(x))
            for _ in range(3):
                for name, p in layer.named_parameters():
                    if "base_layer" not in name:
                        p.data.add_(torch.randn_like(p), alpha=0.05)
                short = layer(x)
                with torch.enable_grad():
                    recorded = layer(x)
                assert recorded.requires_grad and not short.requires_grad
                assert_close(short, recorded.detach().double(), dtype)
