"""The contract of every operator, point by point: what holds beside the numbers."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operators import ANY_CASE, ONE_CASE, call, double, forward_backward, leaves, raw_calls
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import peftk
from peftk.kernels.shared.philox import philox
from peftk.runtime import registry
from peftk.testing.cases import Case, butterfly, low_rank
from peftk.testing.compare import assert_close, assert_same_bits

F = peftk.functional


@ANY_CASE
def test_raw_operator_refuses_autograd_and_names_the_function(case: Case) -> None:
    for name, args in raw_calls(case, torch.device("cpu")):
        args = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        with pytest.raises(RuntimeError, match=rf"peftk\.functional\.{case.operator}\b"):
            getattr(torch.ops.peftk, name)(*args)


@ONE_CASE
def test_torch_func_grad(case: Case) -> None:
    inputs, wanted = leaves(case, case.inputs())
    name = case.gradients[0]

    def loss(value: Tensor) -> Tensor:
        return call(
            case, {**{k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}, name: value}
        ).sum()

    found = torch.func.grad(loss)(wanted[name].detach())
    (expected,) = torch.autograd.grad(call(case, inputs).sum(), [wanted[name]])
    assert_close(found, expected, torch.float64)


@ANY_CASE
def test_checkpointing_replays(case: Case) -> None:
    y, grads, grad = forward_backward(lambda **kw: call(case, kw), case, double(case))
    inputs, wanted = leaves(case, case.inputs())
    again = checkpoint(lambda kw: call(case, kw), inputs, use_reentrant=False)
    assert_same_bits(again, y)
    if not wanted:
        return
    for name, found in zip(wanted, torch.autograd.grad(again, list(wanted.values()), grad), strict=True):
        assert_same_bits(found, grads[name], what=f"d{name}")


def test_checkpointing_replays_a_drawn_seed() -> None:
    x, a, b = torch.randn(6, 8), torch.randn(2, 8, requires_grad=True), torch.randn(4, 2)
    torch.manual_seed(3)
    y = checkpoint(lambda x: F.low_rank_add(torch.zeros(6, 4), x, a, b, dropout_p=0.5), x, use_reentrant=False)
    (found,) = torch.autograd.grad(y.sum(), a)
    torch.manual_seed(3)
    y = F.low_rank_add(torch.zeros(6, 4), x, a, b, dropout_p=0.5)
    assert_same_bits(found, torch.autograd.grad(y.sum(), a)[0])


@pytest.mark.parametrize("backends", [("torch", "native"), ("native", "torch")])
@ONE_CASE
def test_forward_and_backward_on_different_backends(case: Case, backends: tuple[str, str]) -> None:
    inputs, wanted = leaves(case, case.cast(case.inputs(), torch.float32))
    with peftk.use_backend(backends[0]):
        y = call(case, inputs)
    with peftk.use_backend(backends[1]):
        found = torch.autograd.grad(y, list(wanted.values()), torch.ones_like(y))
    _, expected, _ = forward_backward(case.formula, case, case.inputs(), torch.ones_like(y).double())
    for name, gradient in zip(wanted, found, strict=True):
        assert_close(gradient, expected[name], torch.float32, what=f"d{name}")


@ANY_CASE
def test_autocast(case: Case) -> None:
    inputs = case.cast(case.inputs(), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, grads, _ = forward_backward(lambda **kw: call(case, kw), case, inputs)
    # What is no layer, or works on the output of one, keeps its dtype.
    casts = "x" in inputs and "base" not in inputs and case.operator != "scale_channels"
    assert y.dtype == (torch.bfloat16 if casts else torch.float32)
    truth, expected, _ = forward_backward(case.formula, case, case.inputs())
    assert_close(y, truth, torch.bfloat16)
    for name, found in grads.items():
        assert found.dtype == torch.float32
        assert_close(found, expected[name], torch.bfloat16, what=f"d{name}")


@ONE_CASE
def test_only_wanted_gradients_are_computed(case: Case) -> None:
    _, expected, grad = forward_backward(lambda **kw: call(case, kw), case, double(case))
    for name in case.gradients:
        inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in double(case).items()}
        inputs[name].requires_grad_()
        (found,) = torch.autograd.grad(call(case, inputs), [inputs[name]], grad)
        assert_close(found, expected[name], torch.float64, what=f"d{name} alone")


@ANY_CASE
def test_flops_and_profile_show_the_operator(case: Case) -> None:
    inputs = double(case)
    with FlopCounterMode(display=False) as counter:
        y = call(case, inputs)
        if case.gradients:
            y.sum().backward()
    counts = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    assert counts[f"peftk.{case.operator}"] > 0
    assert not case.gradients or counts[f"peftk.{case.operator}_backward"] > 0
    with torch.profiler.profile() as profile:
        call(case, inputs)
    assert f"peftk::{case.operator}" in {e.key for e in profile.key_averages()}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_row_and_block(poison: float) -> None:
    x, blocks = torch.randn(70, 24), torch.randn(3, 8, 8)
    x[65, 9] = poison
    for backend in ("torch", "native"):
        with peftk.use_backend(backend):
            y = F.block_rotate(x, blocks)
        expected = torch.zeros(70, 24, dtype=torch.bool)
        expected[65, 8:16] = True
        assert torch.equal(~y.isfinite(), expected)


def test_backends_draw_the_published_random_numbers() -> None:
    # The first block of Philox4x32-10 for a zero key and counter, as published with the Random123 library.
    published = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(0, 4, torch.device("cpu")).tolist() == published
    assert list(low_rank.philox(0, 4)) == published
    x, a, b = torch.ones(64, 63), torch.eye(63), torch.eye(63)
    kept = []
    for backend in ("torch", "native"):
        with peftk.use_backend(backend):
            kept.append(F.low_rank_add(torch.zeros(64, 63), x, a, b, dropout_p=0.25, seed=torch.tensor(2**62 + 7)))
    assert_same_bits(kept[0], kept[1])


def test_dropout_keeps_the_expected_share() -> None:
    x = torch.ones(1000, 100)
    y = F.low_rank_add(torch.zeros(1000, 100), x, torch.eye(100), torch.eye(100), dropout_p=0.3, seed=torch.tensor(1))
    share = (y != 0).double().mean().item()
    # Five standard deviations of a binomial share.
    assert abs(share - 0.7) < 5 * (0.3 * 0.7 / x.numel()) ** 0.5


def test_fresh_adapter_changes_no_bit() -> None:
    for rows in (1, 7):
        x, weight, bias = torch.randn(rows, 32), torch.randn(24, 32), torch.randn(24)
        for dtype in (torch.float32, torch.bfloat16):
            x_, weight_, bias_ = x.to(dtype), weight.to(dtype), bias.to(dtype)
            expected = torch.nn.functional.linear(x_, weight_, bias_)
            for backend in ("torch", "native"):
                with peftk.use_backend(backend):
                    y = F.low_rank_linear(x_, weight_, bias_, torch.randn(4, 32), torch.zeros(24, 4), 2.0)
                    assert_same_bits(y, expected)
                    rotation = F.cayley(torch.zeros(4, 28), 8)
                    assert_same_bits(rotation, torch.eye(8).expand(4, 8, 8).contiguous())
                    assert_same_bits(F.block_rotate_linear(x_, weight_, bias_, rotation), expected)


def test_named_backend_raises_with_every_reason() -> None:
    x, blocks = torch.randn(2, 4, dtype=torch.float64), torch.randn(1, 4, 4)
    with peftk.use_backend("native"), pytest.raises(RuntimeError, match=r"float32 and bfloat16; got torch\.float64"):
        F.block_rotate(x, blocks)
    with peftk.use_backend("triton"), pytest.raises(RuntimeError, match="'triton', which cannot"):
        F.block_rotate(x, blocks)


def test_automatic_choice_steps_down_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    x, blocks = torch.randn(2, 4, dtype=torch.float64), torch.randn(1, 4, 4)
    operator = registry.OPERATORS["block_rotate"]
    operator._stepped_down.clear()
    with caplog.at_level(logging.INFO, logger="peftk"):
        F.block_rotate(x, blocks)
        F.block_rotate(x, blocks)
    said = [r.message for r in caplog.records if "got torch.float64" in r.message]
    assert [message.split()[1] for message in said] == ["native", "triton"]


def test_explain_names_the_backend_that_runs() -> None:
    x, blocks = torch.randn(2, 4), torch.randn(1, 4, 4)
    explanation = peftk.explain("block_rotate", x, blocks)
    assert explanation.chosen in {c.backend for c in explanation.candidates if c.reason is None}
    with peftk.use_backend("torch"):
        assert peftk.explain("block_rotate", x, blocks).chosen == "torch"
    assert "float64" in str(peftk.explain("block_rotate", x.double(), blocks))
    with pytest.raises(ValueError, match="operator: expected one of block_rotate"):
        peftk.explain("rotate", x, blocks)


def test_use_backend_checks_its_argument_and_its_place() -> None:
    with pytest.raises(ValueError, match="use_backend: expected one of auto"), peftk.use_backend("cuda"):
        pass

    @torch.compile(backend="eager", fullgraph=True)
    def inside(x: Tensor) -> Tensor:
        with peftk.use_backend("torch"):
            return x + 1

    with pytest.raises(Exception, match="outside a compiled function"):
        inside(torch.ones(2))


def test_environment_names_the_backend() -> None:
    script = "import peftk, torch; print(peftk.explain('block_rotate', torch.ones(2, 4), torch.eye(4)[None]).chosen)"
    for value, expected in (("torch", "torch"), ("native", "native")):
        environment = {"PEFTK_BACKEND": value, "PATH": ""}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
    done = subprocess.run([sys.executable, "-c", script], env={"PEFTK_BACKEND": "gpu"}, capture_output=True, text=True)
    assert "PEFTK_BACKEND: expected one of auto, native, torch, triton; got 'gpu'" in done.stderr


X, A, B, W = torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2), torch.randn(5, 4)
BLOCKS = torch.randn(2, 2, 2)
BAD = {
    "x is a list": (lambda: F.block_rotate([1.0], BLOCKS), TypeError, "x: expected a torch.Tensor; got list"),
    "x is an integer tensor": (lambda: F.block_rotate(X.int(), BLOCKS), TypeError, "x: expected dtype float64"),
    "x is complex": (lambda: F.low_rank_add(W, X.cfloat(), A, B), TypeError, "x: expected dtype"),
    "x is sparse": (lambda: F.block_rotate(X.to_sparse(), BLOCKS), ValueError, "x: expected a strided tensor"),
    "x is a scalar": (lambda: F.block_rotate(torch.tensor(1.0), BLOCKS), ValueError, "x: expected at least 1 dim"),
    "blocks elsewhere": (lambda: F.block_rotate(X, BLOCKS.to("meta")), ValueError, "blocks: expected a tensor on cpu"),
    "blocks not square": (lambda: F.block_rotate(X, torch.ones(2, 2, 3)), ValueError, r"blocks: expected shape \(nb"),
    "blocks do not divide": (lambda: F.block_rotate(X, torch.ones(1, 3, 3)), ValueError, "the last size of x"),
    "blocks too few": (lambda: F.block_rotate(torch.ones(3, 8), BLOCKS), ValueError, r"nb \* b = 8"),
    "no blocks": (lambda: F.block_rotate(X, torch.ones(0, 2, 2)), ValueError, "nb, b >= 1"),
    "weight trains": (
        lambda: F.block_rotate_linear(X, W.clone().requires_grad_(), None, BLOCKS),
        ValueError,
        "weight: expected a frozen tensor",
    ),
    "weight too wide": (lambda: F.block_rotate_linear(X, W.mT, None, BLOCKS), ValueError, "weight: expected shape"),
    "bias too long": (lambda: F.block_rotate_linear(X, W, X[0], BLOCKS), ValueError, "bias: expected shape"),
    "factors not square": (lambda: F.butterfly_compose(torch.ones(1, 2, 3, 4)), ValueError, r"factors: expected shape"),
    "odd half-blocks": (lambda: F.butterfly_compose(torch.ones(2, 2, 3, 3)), ValueError, "blocks of an even size"),
    "too few blocks": (lambda: F.butterfly_compose(torch.ones(3, 6, 2, 2)), ValueError, r"a multiple of 2\^\(m - 1\)"),
    "factors do not fit x": (
        lambda: F.butterfly_multiply(X, torch.ones(1, 3, 2, 2)),
        ValueError,
        r"x: expected .* 6\)",
    ),
    "factors are a list": (lambda: F.butterfly_multiply(X, [BLOCKS]), TypeError, "factors: expected a torch.Tensor"),
    "scale too long": (
        lambda: F.scale_channels(X, W[0, :3]),
        ValueError,
        r"scale: expected shape \(channels,\) = \(4,",
    ),
    "bias of the scale": (lambda: F.scale_channels(X, W[0], X[:, 0]), ValueError, "bias: expected shape"),
    "dim out of range": (lambda: F.scale_channels(X, W[0], dim=2), ValueError, "dim: expected a dimension of x"),
    "dim is a float": (lambda: F.scale_channels(X, W[0], dim=1.0), TypeError, "dim: expected an integer"),
    "gain too long": (
        lambda: F.dora_compose(torch.ones(3, 5), X, A, B, X[0]),
        ValueError,
        r"gain: expected shape \(out_features,\) = \(5\)",
    ),
    "bias of the gain": (
        lambda: F.dora_compose(torch.ones(3, 5), X, A, B, W[:, 0], X[0]),
        ValueError,
        "bias: expected",
    ),
    "base of the gain": (lambda: F.dora_compose(X, X, A, B, W[:, 0]), ValueError, "base: expected shape"),
    "norm of a vector": (lambda: F.dora_norm(X[0], A, B), ValueError, r"weight: expected shape \(out_features, in"),
    "norm with another a": (lambda: F.dora_norm(W, W[:, :3], B), ValueError, "a: expected shape"),
    "norm with another b": (lambda: F.dora_norm(W, A, B[:4]), ValueError, "b: expected shape"),
    "norm of rank zero": (lambda: F.dora_norm(W, A[:0], B[:, :0]), ValueError, "rank >= 1"),
    "norm with a NaN": (lambda: F.dora_norm(W, A, B, float("nan")), ValueError, "scale: expected a finite"),
    "norm with scales": (lambda: F.dora_norm(W, A, B, A[0]), ValueError, "scale: expected a number"),
    "triangle too short": (lambda: F.cayley(torch.ones(1, 2), 4), ValueError, r"skew: expected shape .* = \(nb, 6\)"),
    "block size is a float": (lambda: F.cayley(torch.ones(1, 1), 2.0), TypeError, "block_size: expected an integer"),
    "block size is zero": (lambda: F.cayley(torch.ones(1, 0), 0), ValueError, "block_size: expected a positive"),
    "no terms": (lambda: F.cayley(torch.ones(1, 1), 2, neumann_terms=0), ValueError, "neumann_terms: expected None"),
    "too many terms": (lambda: F.cayley(torch.ones(1, 1), 2, neumann_terms=2**70), ValueError, "from 1 to 64"),
    "terms is a bool": (lambda: F.cayley(torch.ones(1, 1), 2, neumann_terms=True), TypeError, "neumann_terms"),
    "a too wide": (lambda: F.low_rank_linear(X, W, None, W, B), ValueError, "b: expected shape"),
    "rank zero": (lambda: F.low_rank_linear(X, W, None, A[:0], B[:, :0]), ValueError, "rank >= 1"),
    "a does not fit x": (lambda: F.low_rank_linear(X, W, None, B, B), ValueError, "a: expected shape"),
    "b does not fit the weight": (lambda: F.low_rank_linear(X, W[:4], None, A, B), ValueError, "weight: expected"),
    "base does not fit": (lambda: F.low_rank_add(X, X, A, B), ValueError, "base: expected shape"),
    "scale is NaN": (lambda: F.low_rank_linear(X, W, None, A, B, float("nan")), ValueError, "scale: expected a finite"),
    "scale is infinite": (lambda: F.low_rank_linear(X, W, None, A, B, float("inf")), ValueError, "scale: expected a"),
    "scale is a string": (lambda: F.low_rank_linear(X, W, None, A, B, "1"), TypeError, "scale: expected a number"),
    "scale is a vector": (lambda: F.low_rank_linear(X, W, None, A, B, A[0]), ValueError, "scale: expected a number"),
    "gate does not fit": (lambda: F.low_rank_linear(X, W, None, A, B, gate=X[0]), ValueError, "gate: expected shape"),
    "dropout of one": (lambda: F.low_rank_linear(X, W, None, A, B, dropout_p=1.0), ValueError, "0 <= dropout_p < 1"),
    "dropout is NaN": (lambda: F.low_rank_linear(X, W, None, A, B, dropout_p=float("nan")), ValueError, "dropout_p"),
    "seed is a number": (
        lambda: F.low_rank_linear(X, W, None, A, B, dropout_p=0.1, seed=3),
        TypeError,
        "seed: expected",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    function, error, message = BAD[name]
    with pytest.raises(error, match=message):
        function()


def test_raw_native_operators_check_before_they_touch_memory() -> None:
    native = torch.ops.peftk_native
    x = torch.ones(3, 4)
    for bad in (
        lambda: native.block_rotate(x, BLOCKS.double(), False, torch.empty(3, 4)),
        lambda: native.block_rotate(x, torch.ones(2, 3, 3), False, torch.empty(3, 4)),
        lambda: native.block_rotate(x, BLOCKS, False, torch.empty(3, 3)),
        lambda: native.block_rotate(x.mT, BLOCKS, False, torch.empty(4, 3)),
        lambda: native.block_rotate(x.half(), BLOCKS, False, torch.empty(3, 4).half()),
        lambda: native.block_rotate_backward(x, x[:2], BLOCKS, False, torch.empty(0), torch.empty(2, 2, 2)),
        lambda: native.cayley(torch.ones(2, 1), 3, [], torch.empty(2, 3, 3)),
        lambda: native.cayley(torch.ones(2, 1), 0, [], torch.empty(2, 3, 3)),
        lambda: native.cayley(torch.ones(1, 65 * 32), 65, [], torch.empty(1, 65, 65)),
        lambda: native.butterfly_compose(torch.ones(2, 3, 2, 2), torch.empty(1, 4, 4)),
        lambda: native.butterfly_compose(torch.ones(2, 2, 3, 3), torch.empty(1, 6, 6)),
        lambda: native.butterfly_compose(torch.ones(2, 2, 2, 2), torch.empty(1, 4, 2)),
        lambda: native.butterfly_compose_backward(torch.ones(2, 2, 2), torch.ones(1, 2, 2, 2), torch.empty(4)),
        lambda: native.scale_channels(x, torch.ones(5), None, 1, torch.empty(3, 4)),
        lambda: native.scale_channels(x, torch.ones(4), torch.ones(3), 1, torch.empty(3, 4)),
        lambda: native.scale_channels(x, torch.ones(4), None, 1, torch.empty(3)),
        lambda: native.dora_norm(W, A, B, True, 1.0, torch.empty(5)),
        lambda: native.dora_norm(W, A, B[:4], False, 1.0, torch.empty(5)),
        lambda: native.dora_norm(W, A, B, False, 1.0, torch.empty(4)),
        lambda: native.dora_compose(torch.ones(3, 5), x[:, :2], B, W[:, 0], None, 1.0, torch.empty(3, 5)),
        lambda: native.dora_compose(torch.ones(3, 5), x, B, torch.ones(5), None, 1.0, torch.empty(3, 5)),
        lambda: native.dora_compose(torch.ones(3, 5), torch.ones(3, 2), B, x, None, 1.0, torch.empty(3, 5)),
        lambda: native.dora_compose(torch.ones(3, 5), torch.ones(3, 2), B, torch.ones(5), x, 1.0, torch.empty(15)),
        lambda: native.dora_compose(torch.ones(2, 3), torch.ones(3, 2), B, torch.ones(5), None, 1.0, torch.empty(6)),
        lambda: native.dropout(x, 0, -1, 1.0, torch.empty(3, 4)),
        lambda: native.dropout(x, 0, 1, 1.0, torch.empty(3)),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            bad()


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_one_changes_no_bit(backend: str, dtype: torch.dtype) -> None:
    x, bias = torch.randn(3, 5, 2).to(dtype), torch.randn(5).to(dtype)
    x[0, 0], x[1, :, 1] = -0.0, torch.inf
    with peftk.use_backend(backend):
        assert_same_bits(F.scale_channels(x, torch.ones(5), bias, dim=1), x)
        assert_same_bits(F.scale_channels(x[..., 0], torch.ones(5), bias), x[..., 0].contiguous())


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_dora_adapter_changes_no_bit(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(70, 40).to(dtype), torch.randn(300, 40).to(dtype), torch.randn(300).to(dtype)
    base, a, b = torch.nn.functional.linear(x, weight, bias), torch.randn(4, 40), torch.zeros(300, 4)
    with peftk.use_backend(backend):
        for stored in (weight, weight.mT.contiguous().mT):
            norms = F.dora_norm(stored, a, b, 2.0)
            assert_same_bits(F.dora_norm(stored, 3 * a, b, 0.5), norms)
            assert_same_bits(F.dora_norm(stored, a, torch.randn(300, 4), 0.0), norms)
            assert_close(norms, weight.double().norm(dim=1), torch.float32)
        assert_same_bits(F.dora_compose(base, x, a, b, torch.ones(300), bias, 2.0), base)


def test_no_gradient_reaches_a_norm() -> None:
    leaves = [t.clone().requires_grad_() for t in (W, A, B, torch.tensor(0.5))]
    assert not F.dora_norm(*leaves).requires_grad


@pytest.mark.parametrize(("stages", "count", "size"), [(9, 256, 4), (4, 8, 34), (2, 2, 130)])
def test_large_groups_take_several_passes(stages: int, count: int, size: int) -> None:
    """Nine stages in two passes, passes of two stages each, and of one; against stage after stage."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.eye(size) + 0.5 / size * torch.randn(stages, count, size, size, generator=generator)
    x = torch.randn(3, count * size, generator=generator)
    for backend in ("torch", "native"):
        with peftk.use_backend(backend):
            y = F.butterfly_multiply(x, factors)
        assert_close(y, butterfly.multiply(x.double(), factors.double()), torch.float32, what=backend)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 140), st.integers(1, 6), st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_rotation_of_any_shape(rows: int, count: int, size: int, shared: bool, transpose: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, count * size, generator=generator)
    blocks = torch.randn(1 if shared else count, size, size, generator=generator)
    dense = torch.block_diag(*blocks.double().expand(count, size, size))
    truth = x.double() @ (dense.mT if transpose else dense)
    with peftk.use_backend("native"):
        assert_close(F.block_rotate(x, blocks, transpose=transpose), truth, torch.float32)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 64), st.floats(-4, 2), st.integers(0, 2**31))
def test_exact_cayley_is_orthogonal(size: int, exponent: float, seed: int) -> None:
    """For every norm of the generator from 1e-4 to 100, in both exact backends."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(3, size * (size - 1) // 2, generator=generator)
    rows, cols = torch.triu_indices(size, size, 1)
    skew = torch.zeros(3, size, size)
    skew[:, rows, cols] = packed
    norm = torch.linalg.matrix_norm(skew - skew.mT, 2).max()
    eye = torch.eye(size, dtype=torch.float64)
    for backend in ("torch", "native"):
        with peftk.use_backend(backend):
            r = F.cayley(packed * (10**exponent / norm), size).double()
        assert_close(r @ r.mT, eye.expand(3, size, size), torch.float32, what=f"R R^T on {backend}")
