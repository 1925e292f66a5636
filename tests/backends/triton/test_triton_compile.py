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

import triton
import triton.language as tl
from peftk.triton_kernels import _launch, low_rank
from support.triton_calls import CALLS, FP32, TOKENS, WIDTH, meta, of_all

from peftk import triton_kernels
from peftk.runtime import registry
from peftk.testing import triton_compiler
from peftk.testing.calls import KINDS
from peftk.testing.calls import Call as Shaped
from peftk.testing.triton_compiler import SHARED_LIMITS, TARGETS, Compiled, Specialization

if _launch.INTERPRETED:
    pytest.skip("an interpreted process compiles nothing", allow_module_level=True)

OPERATORS = {n: o for n, o in registry.OPERATORS.items() if not isinstance(o.kernel("triton"), str)}
FAMILIES = sorted({o.family for o in OPERATORS.values()})

SPILLS, ONLY, NARROW, LAUNCHES = (of_all(trait) for trait in ("SPILLS", "ONLY", "NARROW", "LAUNCHES"))


def recorded(operator: str, args: tuple) -> list[_launch.Launch]:
    with _launch.recorded() as launches:
        assert OPERATORS[operator].reason("triton", args) is None
        OPERATORS[operator].kernel("triton")[0](*args)
    return launches


def specializations(family: str) -> list[Specialization]:
    launches = [launch for call in CALLS[family]() for launch in recorded(*call)]
    if family == "low_rank":
        # The other designs of the fused layer, which no shape chooses by itself yet.
        for name, (operator, args) in itertools.product(low_rank.DESIGNS, CALLS["low_rank"]()):
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


def test_the_series_of_any_block_is_one_launch() -> None:
    assert [len(recorded(*call)) for call in CALLS["cayley"]()] == [1] * len(list(CALLS["cayley"]()))


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
