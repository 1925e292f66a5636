"""Every Triton kernel x shipped config, compiled for four GPUs that need not be there.

The launches are those that full-size calls on meta tensors make. What a kernel must compile to is read from its own
matrix products and from what its arguments are known to be divisible by.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which has no package for this platform")

import torch
import triton
import triton.language as tl
from peftk.triton_kernels import _launch, low_rank
from torch import Tensor

from peftk import triton_kernels
from peftk.runtime import registry
from peftk.testing import triton_compiler
from peftk.testing.calls import KINDS
from peftk.testing.calls import Call as Shaped
from peftk.testing.calls.cayley import NEUMANN
from peftk.testing.triton_compiler import SHARED_LIMITS, TARGETS, Compiled, Specialization

if _launch.INTERPRETED:
    pytest.skip("an interpreted process compiles nothing", allow_module_level=True)

TOKENS, WIDTH = 8192, 4096
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPERATORS = {n: o for n, o in registry.OPERATORS.items() if not isinstance(o.kernel("triton"), str)}
FAMILIES = sorted({o.family for o in OPERATORS.values()})
Call = tuple[str, tuple]

# (kernel, target) to the reason why its spills are accepted.
SPILLS: dict[tuple[str, str], str] = {}
# Kernels that are launched only on the targets named.
ONLY = {"_linear_kernel": ("sm_90", "sm_100")}
# Accesses that need not be wide: the rows of a packed triangle start anywhere, and are nothing beside the activations.
NARROW = {
    # A row's tile has few elements for each thread; rolled rows and diagonals of circulant blocks start anywhere.
    "_circulant_mix_kernel": {"load"},
    "_circulant_contract_kernel": {"load"},
    "_circulant_weight_kernel": {"load"},
    "_circulant_weight_backward_kernel": {"load", "store"},
    "_cayley_kernel": {"load"},
    "_cayley_panel_kernel": {"load"},
    "_cayley_backward_kernel": {"store"},
    "_cayley_panel_backward_kernel": {"store"},
    # Factors with the rank last have short rows; the gradients in the factors are nothing beside the incoming one.
    "_khatri_rao_kernel": {"load"},
    "_khatri_rao_backward_kernel": {"load", "store"},
    "_hadamard_gradient_kernel": {"store"},
    # One sum for every row.
    "_dora_norm_kernel": {"store"},
    # Half-blocks of a few features.
    "_butterfly_stage_kernel": {"load", "store"},
    "_butterfly_stage_backward_kernel": {"load", "store"},
}


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def block_diagonal_calls() -> Iterator[Call]:
    def calls(rows: int, features: int, size: int, dtype: torch.dtype, parameters: torch.dtype, transpose: bool):
        x, blocks = meta(rows, features, dtype=dtype), meta(features // size, size, size, dtype=parameters)
        yield "block_rotate", (x, blocks, transpose)
        yield "block_rotate_backward", (x, x, blocks, transpose, True, True)

    for size in (2, 4, 8, 16, 32, 64, 128, 256):
        yield from calls(TOKENS, WIDTH, size, BF16, FP32, False)
    for size in (32, 256):
        yield from calls(TOKENS, WIDTH, size, BF16, BF16, True)
    for size in (2, 16, 32, 64, 128, 256):
        yield from calls(TOKENS, WIDTH, size, FP32, FP32, False)
    yield from calls(TOKENS, WIDTH, 32, FP16, FP32, False)
    yield from calls(TOKENS - 1, 4095, 13, BF16, FP32, False)
    yield from calls(1, WIDTH, 32, BF16, FP32, False)
    yield from calls(1, WIDTH, 256, BF16, FP32, False)
    x, weight, bias, blocks = meta(TOKENS, WIDTH, dtype=BF16), meta(WIDTH, WIDTH, dtype=BF16), None, meta(128, 32, 32)
    shared = meta(1, 32, 32)
    yield "block_rotate", (x, shared, False)
    yield "block_rotate_backward", (x, x, shared, False, True, True)
    yield "block_rotate_backward", (x, x, blocks, False, True, False)
    yield "block_rotate_backward", (x, x, blocks, False, False, True)
    yield "block_rotate_linear", (x, weight, bias, blocks)
    yield "block_rotate_linear_backward", (x, x, weight, blocks, True, True, False)


def butterfly_calls() -> Iterator[Call]:
    def calls(stages: int, size: int):
        group = size << (stages - 1)
        factors = meta(stages, WIDTH // size, size, size)
        yield "butterfly_compose", (factors,)
        yield "butterfly_compose_backward", (meta(WIDTH // group, group, group), factors)

    for stages, size in ((2, 4), (3, 2), (4, 8), (2, 32), (2, 128)):
        yield from calls(stages, size)
    x, factors = meta(TOKENS, WIDTH, dtype=BF16), meta(2, WIDTH // 4, 4, 4)
    yield "butterfly_multiply", (x, factors)
    yield "butterfly_multiply_backward", (x, x, factors, True, True)
    for dtype, shape, inner in ((BF16, (TOKENS, WIDTH), 1), (FP32, (TOKENS, WIDTH), 1), (BF16, (8, 320, 4096), 4096)):
        x, scale = meta(*shape, dtype=dtype), meta(shape[1])
        for bias in (meta(shape[1], dtype=dtype), None):
            yield "scale_channels", (x, scale, bias, inner)
            yield "scale_channels_backward", (x, x, scale, bias, inner, True, True, bias is not None)


def cayley_calls() -> Iterator[Call]:
    for size in (2, 13, 16, 32, 64, 65, 128, 256):
        count = WIDTH // size
        packed, blocks = meta(count, size * (size - 1) // 2), meta(count, size, size)
        yield "cayley", (packed, size, NEUMANN)
        yield "cayley_backward", (blocks, packed, blocks, NEUMANN)


def low_rank_calls() -> Iterator[Call]:
    def calls(rows: int, features: int, rank: int, dtype: torch.dtype, gate: str | None = None, p: float = 0.0):
        x, a = meta(rows, features, dtype=dtype), meta(rank, features, dtype=dtype)
        y, b, hidden = meta(rows, WIDTH, dtype=dtype), meta(WIDTH, rank, dtype=dtype), meta(rows, rank, dtype=dtype)
        weight, bias = meta(WIDTH, features, dtype=dtype), meta(WIDTH, dtype=dtype)
        gates = {None: None, "rank": meta(rank), "token": meta(rows, rank)}
        factors = a, b, gates[gate], 2.0, p, torch.tensor(1234) if p else None
        needs = True, True, True, gate is not None
        yield "low_rank_add", (y, x, *factors)
        yield "low_rank_add_backward", (y, x, hidden, *factors, *needs)
        yield "low_rank_linear", (x, weight, bias, *factors)
        yield "low_rank_linear_backward", (y, x, hidden, weight, *factors, *needs, True)

    for rank in (1, 8, 16, 64, 128, 256):
        yield from calls(TOKENS, WIDTH, rank, BF16)
    yield from calls(TOKENS, WIDTH, 16, BF16, None, 0.1)
    yield from calls(TOKENS, WIDTH, 16, BF16, "rank", 0.0)
    yield from calls(TOKENS, WIDTH, 16, BF16, "token", 0.1)
    yield from calls(TOKENS, WIDTH, 16, FP16)
    yield from calls(TOKENS, WIDTH, 16, FP32)
    yield from calls(TOKENS, WIDTH, 64, FP32, "rank", 0.1)
    yield from calls(TOKENS - 1, 4095, 7, BF16, "rank", 0.1)
    yield from calls(1, WIDTH, 16, BF16)


def dora_calls() -> Iterator[Call]:
    def calls(rows: int, features: int, rank: int, dtype: torch.dtype, bias: bool = True):
        x, a = meta(rows, features, dtype=dtype), meta(rank, features, dtype=dtype)
        y, b, hidden = meta(rows, WIDTH, dtype=dtype), meta(WIDTH, rank, dtype=dtype), meta(rows, rank, dtype=dtype)
        rest = a, b, meta(WIDTH), meta(WIDTH, dtype=dtype) if bias else None, 2.0
        yield "dora_norm", (meta(WIDTH, features, dtype=dtype), meta(rank, features), meta(WIDTH, rank), 2.0)
        yield "dora_compose", (y, x, *rest)
        yield "dora_compose_backward", (y, y, x, hidden, *rest, True, True, True, True, True, bias)

    # Sizes that the calls of `low_rank` have too: what both launch is compiled once.
    yield from calls(TOKENS, WIDTH, 16, BF16)
    yield from calls(TOKENS, WIDTH, 64, BF16, False)
    yield from calls(TOKENS, WIDTH, 16, FP32)
    for dtype in (BF16, FP32):
        yield "dora_norm", (meta(WIDTH, WIDTH, dtype=dtype).mT, meta(16, WIDTH), meta(WIDTH, 16), 2.0)
    yield "dora_norm", (meta(WIDTH - 1, 4095, dtype=FP16), meta(7, 4095), meta(WIDTH - 1, 7), 2.0)


def hadamard_calls() -> Iterator[Call]:
    def factors(out: int, features: int, rank: int, dtype: torch.dtype) -> tuple:
        left, right = meta(out, rank, dtype=dtype), meta(rank, features, dtype=dtype)
        return left, right, left, right

    needs = True, True, True, True
    for rank, dtype, parameters in ((8, BF16, FP32), (32, FP32, FP32), (5, FP16, FP16)):
        four = factors(WIDTH, WIDTH, rank, parameters)
        yield "khatri_rao", (*four, dtype)
        a, b = meta(rank**2, WIDTH, dtype=dtype), meta(WIDTH, rank**2, dtype=dtype)
        yield "khatri_rao_backward", (a, b, *four, *needs)
    for rank, dtype, parameters in ((8, BF16, FP32), (32, BF16, FP32), (32, FP32, FP32)):
        four, weight = factors(WIDTH, WIDTH, rank, parameters), meta(WIDTH, WIDTH, dtype=dtype)
        yield "hadamard_weight", (weight, *four, 1.5)
        yield "hadamard_weight_backward", (weight, *four, 1.5, *needs)
    four, weight = factors(WIDTH - 1, 4095, 13, FP32), meta(WIDTH - 1, 4095, dtype=FP16)
    yield "hadamard_weight", (weight, *four, 1.5)
    yield "hadamard_weight_backward", (weight, *four, 1.5, *needs)
    yield "hadamard_weight_backward", (weight, *four, 1.5, True, False, True, False)


def kronecker_calls() -> Iterator[Call]:
    def calls(rows: int, sizes: tuple[int, int, int, int], dtype: torch.dtype, fused: bool = True):
        left, middle, height, width = sizes
        x, y = meta(rows, middle * width, dtype=dtype), meta(rows, left * height, dtype=dtype)
        weight, factors = meta(left * height, middle * width, dtype=dtype), (meta(left, middle), meta(height, width))
        small = factors[0], meta(height, width, dtype=dtype), 0.5
        yield "kronecker_add", (y, x, *small)
        yield "kronecker_add_backward", (y, x, *small, True, True, True)
        if fused:
            yield "kronecker_linear", (x, weight, None, *small)
            yield "kronecker_linear_backward", (y, x, weight, *small, True, True, True, True)
        yield "kronecker_weight", (weight, *factors, 0.5)
        yield "kronecker_weight_backward", (weight, *factors, 0.5, True, True)

    # A w1 of 8 x 8, of 16 x 16, and those of PEFT's default factors of 4096 and of 4096 to 11008.
    yield from calls(TOKENS, (8, 8, 512, 512), BF16)
    yield from calls(TOKENS, (16, 16, 256, 256), BF16, False)
    yield from calls(TOKENS, (64, 64, 64, 64), BF16, False)
    yield from calls(TOKENS, (86, 64, 128, 64), BF16, False)
    yield from calls(TOKENS, (8, 8, 512, 512), FP16, False)
    yield from calls(TOKENS, (8, 8, 512, 512), FP32)
    yield from calls(TOKENS, (32, 32, 128, 128), FP32, False)
    yield from calls(TOKENS - 1, (5, 7, 819, 585), BF16, False)
    yield from calls(1, (8, 8, 512, 512), BF16, False)
    x, factors = meta(TOKENS, WIDTH, dtype=BF16), (meta(8, 8), meta(512, 512, dtype=BF16), 0.5)
    yield "kronecker_add_backward", (x, x, *factors, True, False, True)
    yield "kronecker_add_backward", (x, x, *factors, False, True, False)


def recorded(operator: str, args: tuple) -> list[_launch.Launch]:
    with _launch.recorded() as launches:
        assert OPERATORS[operator].reason("triton", args) is None
        OPERATORS[operator].kernel("triton")[0](*args)
    return launches


def circulant_calls() -> Iterator[Call]:
    def calls(rows: int, features: int, out: int, size: int, dtype: torch.dtype):
        x, y, weight = meta(rows, features, dtype=dtype), meta(rows, out, dtype=dtype), meta(out, features, dtype=dtype)
        kernel = meta(out // size, features // size, size)
        yield "circular_conv", (x, kernel, 1.0)
        yield "circular_conv_backward", (y, x, kernel, 1.0, True, True)
        yield "circular_conv_add", (y, x, kernel, 1.0)
        yield "circular_conv_add_backward", (y, x, kernel, 1.0, True, True)
        yield "circulant_linear", (x, weight, None, kernel, 1.0)
        yield "circulant_linear_backward", (y, x, weight, kernel, 1.0, True, True, False)
        yield "circulant_weight", (weight, kernel, 1.0)
        yield "circulant_weight_backward", (weight, kernel, 1.0)

    yield from calls(TOKENS, WIDTH, WIDTH, 128, BF16)
    yield from calls(TOKENS, WIDTH, WIDTH, 128, FP32)
    # Small blocks, where the dense way is taken; one row; few blocks; and sizes that no power of two divides.
    yield from (
        *itertools.islice(calls(TOKENS, WIDTH, WIDTH, 8, BF16), 2),
        *itertools.islice(calls(1, WIDTH, WIDTH, 128, BF16), 1),
        *itertools.islice(calls(TOKENS, WIDTH, WIDTH, 1024, FP16), 2),
        *calls(TOKENS - 1, 45 * 91, 3 * 91, 91, BF16),
    )


CALLS = {
    "block_diagonal": block_diagonal_calls,
    "butterfly": butterfly_calls,
    "cayley": cayley_calls,
    "circulant": circulant_calls,
    "dora": dora_calls,
    "hadamard": hadamard_calls,
    "kronecker": kronecker_calls,
    "low_rank": low_rank_calls,
}


def specializations(family: str) -> list[Specialization]:
    launches = [launch for call in CALLS[family]() for launch in recorded(*call)]
    if family == "low_rank":
        # The other designs of the fused layer, which no shape chooses by itself yet.
        for name, (operator, args) in itertools.product(low_rank.DESIGNS, low_rank_calls()):
            x = args[0]
            if operator.startswith("low_rank_linear") and x.dtype is not FP32 and x.shape == (TOKENS, WIDTH):
                with low_rank.use_design(name):
                    launches += recorded(operator, args)
    return triton_compiler.distinct(launches)


@pytest.fixture(scope="module")
def cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache, whose keys cover source, options and version: the second run of the tests compiles nothing."""
    if getattr(pytestconfig, "cache", None) is None:
        return tmp_path_factory.mktemp("triton")
    return pytestconfig.cache.mkdir("triton")


def wide_accesses(found: Compiled) -> set[str]:
    """Return what must happen 128 bits at a time: where rows come in multiples of 16 elements, loads and stores."""
    one = found.specialization
    # One row, or a rank of one, leaves no row of 16 elements to some of the tensors.
    if any(dict(one.constexprs).get(name) == 1 for name in ("rows", "rank", "tokens")):
        return set()
    odd = {name for name, kind in one.signature if kind.startswith("i") and name not in one.divisible}
    if found.target.startswith("gfx") or any(
        n.startswith("stride_") or n in ("features", "count", "columns") for n in odd
    ):
        return set()
    # The blocks of the transform, unlike those of the rotation, lie in memory one by one.
    if "cayley" in one.kernel.__module__ and dict(one.constexprs)["SIZE"] % 16:
        return set()
    return {"load", "store"} - NARROW.get(one.kernel.__name__, set())


def matrix_families(found: Compiled) -> set[str]:
    """Return the families of matrix instructions that the products of a kernel must become."""
    half = [(rows, columns, inner) for rows, columns, inner, dtype in found.dots if dtype in ("bf16", "f16")]
    if not half:
        return set()
    if found.target in ("sm_80", "gfx942"):
        return {"mma" if found.target == "sm_80" else "mfma"}
    # Those of a warp group take 64 rows of 4 warps; smaller tiles are left to single warps.
    large = any(rows >= 64 for rows, *_ in half) and dict(found.specialization.options)["num_warps"] % 4 == 0
    return {("wgmma" if found.target == "sm_90" else "tcgen05") if large else "mma"}


def problems(found: Compiled) -> Iterator[str]:
    counts, name = found.counts, found.specialization.kernel.__name__
    if found.spilled and (name, found.target) not in SPILLS:
        yield f"{found.spilled} bytes spilled"
    if found.shared > SHARED_LIMITS[found.target]:
        yield f"{found.shared} bytes of shared memory, more than {SHARED_LIMITS[found.target]}"
    yield from (f"no {family}" for family in matrix_families(found) if not counts[family])
    if found.tf32:
        yield "a product rounds float32 to tf32"
    if counts["atomic"]:
        yield "atomics: the order of their sums is not fixed"
    wide = (
        {
            "load": counts["load_wide"] + counts["copy_wide"] + counts["tma_load"],
            "store": counts["store_wide"] + counts["tma_store"],
        }
        if found.target.startswith("sm_")
        else {}
    )
    for kind in wide_accesses(found):
        if not wide[kind]:
            yield f"no {kind}s of 128 bits"


def shown(found: Compiled) -> str:
    counts = {k: v for k, v in found.counts.items() if v}
    return f"{found.specialization}: {found.registers} registers, {counts}, products {found.dots}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_compiles_to_what_it_should(family: str, target: str, cache: Path) -> None:
    wrong = []
    for one in specializations(family):
        if target not in ONLY.get(one.kernel.__name__, TARGETS):
            continue
        found = triton_compiler.compile_for(one, target, cache)
        wrong += [f"{problem}: {shown(found)}" for problem in problems(found)]
    assert not wrong, f"{len(wrong)} on {target}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("operator", ["block_rotate", "low_rank_add"])
def test_without_divisibility_the_wide_accesses_are_lost(operator: str, cache: Path) -> None:
    """Shows that the check of 128-bit accesses can fail."""
    args = next(args for name, args in CALLS[OPERATORS[operator].family]() if name == operator)
    one = triton_compiler.specialize(recorded(operator, args)[-1])
    found = triton_compiler.compile_for(one, "sm_90", cache)
    lost = triton_compiler.compile_for(one.misaligned(), "sm_90", cache)
    assert found.counts["load_wide"] + found.counts["copy_wide"] > 0 < found.counts["store_wide"]
    assert lost.counts["load_wide"] + lost.counts["copy_wide"] + lost.counts["store_wide"] == 0


@triton.jit
def _greedy(x_ptr, y_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index[:, None] * SIZE + index[None, :])
    tl.store(y_ptr + index[:, None] * SIZE + index[None, :], tl.dot(x, x) + tl.dot(x, tl.trans(x)))


def test_the_checks_can_fail(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile far too large for one warp, in float32: it spills and rounds to tf32."""
    x = meta(128, 128)
    with _launch.recorded() as launches:
        _launch.launch(_greedy, (1,), num_warps=1, x_ptr=x, y_ptr=x, SIZE=128)
    (one,) = triton_compiler.distinct(launches)
    found = triton_compiler.compile_for(one, "sm_80", cache)
    assert any("bytes spilled" in p for p in problems(found))
    assert any("tf32" in p for p in problems(found))
    monkeypatch.setitem(SHARED_LIMITS, "sm_80", found.shared - 1)
    assert any("shared memory" in p for p in problems(found))


LAUNCHES = {
    "block_rotate": ["block_rotate_kernel"],
    "block_rotate_backward": ["block_rotate_backward_kernel"],
    "block_rotate_linear": ["block_rotate_kernel"],
    "block_rotate_linear_backward": ["block_rotate_backward_kernel"],
    "butterfly_compose": ["butterfly_stage_kernel"],
    "butterfly_compose_backward": ["butterfly_stage_backward_kernel"],
    "butterfly_multiply": ["butterfly_stage_kernel", "block_rotate_kernel"],
    "butterfly_multiply_backward": [
        *("butterfly_stage_kernel", "block_rotate_backward_kernel", "butterfly_stage_backward_kernel"),
    ],
    "scale_channels": ["scale_channels_kernel"],
    "scale_channels_backward": ["scale_channels_backward_kernel"],
    "cayley": ["cayley_kernel"],
    "cayley_backward": ["cayley_backward_kernel"],
    "khatri_rao": ["khatri_rao_kernel"] * 2,
    "khatri_rao_backward": ["khatri_rao_backward_kernel"] * 2,
    "hadamard_weight": ["hadamard_weight_kernel"],
    "hadamard_weight_backward": ["hadamard_gradient_kernel", "sum_kernel"] * 4,
    "low_rank_add": ["shrink_kernel", "expand_kernel"],
    "low_rank_add_backward": [
        *("backward_kernel", "hidden_gradient_kernel", "expand_kernel"),
        *("sum_kernel", "factor_gradient_kernel", "sum_kernel"),
    ],
}
LAUNCHES["dora_norm"] = ["dora_norm_kernel"]
LAUNCHES["dora_compose"] = ["shrink_kernel", "dora_compose_kernel"]
LAUNCHES["dora_compose_backward"] = ["scale_channels_backward_kernel", *LAUNCHES["low_rank_add_backward"]]
LAUNCHES["circular_conv"] = LAUNCHES["circular_conv_add"] = LAUNCHES["circulant_linear"] = ["circulant_mix_kernel"]
for _name in ("circular_conv", "circular_conv_add", "circulant_linear"):
    LAUNCHES[f"{_name}_backward"] = ["circulant_mix_kernel", "circulant_contract_kernel"]
LAUNCHES["circulant_weight"] = ["circulant_weight_kernel"]
LAUNCHES["circulant_weight_backward"] = ["circulant_weight_backward_kernel"]
LAUNCHES["kronecker_add"] = LAUNCHES["kronecker_linear"] = ["kronecker_product_kernel"]
LAUNCHES["kronecker_add_backward"] = ["kronecker_product_kernel", "kronecker_factor_kernel"]
LAUNCHES["kronecker_linear_backward"] = LAUNCHES["kronecker_add_backward"]
LAUNCHES["kronecker_weight"] = ["kronecker_weight_kernel"]
LAUNCHES["kronecker_weight_backward"] = ["kronecker_weight_backward_kernel"]
LAUNCHES["low_rank_linear"] = LAUNCHES["low_rank_add"]
LAUNCHES["low_rank_linear_backward"] = LAUNCHES["low_rank_add_backward"]


def test_the_series_of_any_block_is_one_launch() -> None:
    assert [len(recorded(*call)) for call in cayley_calls()] == [1] * len(list(cayley_calls()))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "tokens, features, out",
    [(2**23, 64, 64), (64, 2**21, 64), (64, 64, 2**21)],
    ids=["many rows", "many columns", "many outputs"],
)
def test_no_axis_of_a_grid_ends_before_the_tensors(operator: str, tokens: int, features: int, out: int) -> None:
    kind = KINDS[operator.removesuffix("_backward")]
    if kind.square:
        features = out = max(features, out)
    size = kind.usual
    assert kind.fits(features, out, size)
    for variant in kind.variants:
        for dtype in kind.dtypes:
            call = Shaped(operator, tokens, features, out, size, dtype, variant)
            arguments = call.arguments("meta")
            with _launch.recorded() as launches:
                if call.reason("triton", arguments) is None:
                    call.bind("triton", arguments)()
            for launch in launches:
                first, *rest = launch.grid
                assert first < 2**31 and all(axis <= 65_535 for axis in rest), f"{launch.name}: {launch.grid}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_number_of_launches(operator: str) -> None:
    args = next(args for name, args in CALLS[OPERATORS[operator].family]() if name == operator)
    assert [launch.name for launch in recorded(operator, args)] == LAUNCHES[operator]


def test_every_operator_is_covered() -> None:
    assert set(OPERATORS) == set(registry.OPERATORS) == set(LAUNCHES)
    assert {name for calls in CALLS.values() for name, _ in calls()} == set(OPERATORS)


def test_every_kernel_is_covered() -> None:
    """No kernel of a family is left out by the calls above."""
    compiled = {one.kernel.__name__ for family in FAMILIES for one in specializations(family)}
    written = set()
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        names = vars(importlib.import_module(f"peftk.triton_kernels.{module.name}"))
        written |= {n for n, f in names.items() if isinstance(f, triton.runtime.JITFunction) and n.endswith("_kernel")}
    assert compiled == written
