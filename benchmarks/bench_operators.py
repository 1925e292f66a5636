"""Operators: the kernels of every backend beside each other, and the public functions beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import peftk
from benchmarks import truth
from benchmarks.arms import Arm, Budget, compare
from benchmarks.methods.rotations import plain_cayley
from benchmarks.peers import why_no_compiler
from peftk.testing.calls import KINDS, Call, sweep
from peftk.testing.cases import block_diagonal, low_rank
from peftk.testing.compare import LIMITS

F32, BF16 = torch.float32, torch.bfloat16
TOKENS = 512


# Operator to the sizes, in the words of `sweep`, and the dtypes that it is timed with at each width. One that is not
# named here has its usual size in float32, at the smaller width.
ROWS: dict[str, Callable[[int], tuple[dict[str, tuple[int, ...]], tuple[torch.dtype, ...]]]] = {
    "block_rotate": lambda features: ({"blocks": (8, 32, 256)}, (F32, BF16)),
    "block_rotate_linear": lambda features: ({"blocks": (32,)}, (F32,)),
    "butterfly_compose": lambda features: ({"blocks": (4,)}, (F32,)),
    "cayley": lambda features: ({"blocks": (32, 256)}, (F32,)),
    "circular_conv_add": lambda features: ({"blocks": (32, features // 8)}, (F32,)),
    "circulant_linear": lambda features: ({"blocks": (features // 8,)}, (F32,)),
    "circulant_weight": lambda features: ({"blocks": (32, features // 8)}, (F32,)),
    "hadamard_weight": lambda features: ({"ranks": (8,)}, (F32,)),
    "khatri_rao": lambda features: ({"ranks": (8,)}, (F32,)),
    "kronecker_add": lambda features: ({"factors": (8,)}, (F32,)),
    "kronecker_linear": lambda features: ({"factors": (8,)}, (F32,)),
    "kronecker_weight": lambda features: ({"factors": (8,)}, (F32,)),
    "low_rank_add": lambda features: ({"ranks": (16,)}, (F32,)),
    "low_rank_linear": lambda features: ({"ranks": (16, 64) if features == 1024 else (16,)}, (F32,)),
}


def calls() -> Iterator[Call]:
    """Yield forward and backward operators on the shapes of attention projections, small and large."""
    for features in (1024, 4096):
        shape: dict[str, Any] = {"tokens": (TOKENS,), "widths": ((features, features),)}
        for name, kind in KINDS.items():
            if name in ROWS:
                sizes, dtypes = ROWS[name](features)
            elif features == 1024:
                sizes, dtypes = {f"{kind.size}s": (kind.usual,)}, (F32,)
            else:
                continue
            for operator in (name, f"{name}_backward"):
                for dtype in dtypes:
                    yield from sweep(operator, dtype=dtype, **shape, **sizes)


def _calls() -> list:
    return [
        pytest.param(call, id=str(call), marks=[pytest.mark.full_run] if call.features > 1024 else [])
        for call in calls()
    ]


@pytest.mark.parametrize("call", _calls())
def test_kernel(call: Call, benchmark, budget: Budget) -> None:
    arguments = call.arguments()
    exact = call.truth(arguments)
    arms = []
    for backend in ("native", "torch"):
        if reason := call.reason(backend, arguments):
            arms.append(Arm(backend, skip=reason))
            continue
        step = call.bind(backend, arguments)

        def check(step: Callable[[], Any] = step) -> dict[str, float]:
            return {"result": call.error(step(), exact)}

        arms.append(Arm(backend, step, check, call.limit, note=f"the {backend} kernel itself, without the registry"))
    # Where C++ refuses a call, torch is what peftk runs: the row then says so.
    arms.sort(key=lambda arm: arm.skip is not None)
    benchmark.group = f"kernel {call}"
    info = {
        "suite": "kernels",
        "cell": str(call),
        "method": call.operator,
        "mode": "backward" if call.operator.endswith("_backward") else "forward",
        "tokens": call.tokens,
        "in_features": call.features,
        "out_features": call.out,
        "size": call.size,
        "dtype": str(call.dtype).removeprefix("torch."),
        "parameters": "float32",
    }
    with torch.no_grad():
        compare(benchmark, arms, "torch", info, budget)


def _function_cases(features: int = 1024, size: int = 32, rank: int = 16) -> dict[str, tuple]:
    """Name to (public function, plain PyTorch, dense formula, tensors to differentiate, fixed arguments)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * spread

    x, weight, bias = normal(TOKENS, features), normal(features, features, spread=features**-0.5), normal(features)
    blocks = normal(features // size, size, size, spread=size**-0.5)
    packed = normal(features // size, size * (size - 1) // 2, spread=0.02)
    a, b = normal(rank, features, spread=features**-0.5), normal(features, rank, spread=0.1)
    base = normal(TOKENS, features)
    f = peftk.functional

    def rotate(x: Tensor, blocks: Tensor) -> Tensor:
        return torch.einsum("tnb,nbc->tnc", x.view(len(x), -1, size), blocks).reshape(x.shape)

    def by_neumann(neumann: bool) -> tuple:
        return (
            lambda packed: f.cayley(packed, size, neumann_terms=5 if neumann else None),
            lambda packed: plain_cayley(packed, size, neumann),
            lambda packed: truth.cayley(packed, size, neumann),
            {"packed": packed},
            {},
        )

    frozen = {"weight": weight, "bias": bias}
    return {
        "block_rotate": (f.block_rotate, rotate, block_diagonal.rotate, {"x": x, "blocks": blocks}, {}),
        "block_rotate_linear": (
            f.block_rotate_linear,
            lambda x, weight, bias, blocks: linear(rotate(x, blocks), weight, bias),
            block_diagonal.rotate_linear,
            {"x": x, "blocks": blocks},
            frozen,
        ),
        "cayley-exact": by_neumann(False),
        "cayley-neumann": by_neumann(True),
        "low_rank_add": (
            f.low_rank_add,
            lambda base, x, a, b: base + linear(linear(x, a), b),
            low_rank.add,
            {"base": base, "x": x, "a": a, "b": b},
            {},
        ),
        "low_rank_linear": (
            f.low_rank_linear,
            lambda x, weight, bias, a, b: linear(x, weight, bias) + linear(linear(x, a), b),
            low_rank.linear,
            {"x": x, "a": a, "b": b},
            frozen,
        ),
    }


FUNCTIONS = ("block_rotate", "block_rotate_linear", "cayley-exact", "cayley-neumann", "low_rank_add", "low_rank_linear")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str, benchmark, budget: Budget) -> None:
    function, plain, formula, values, fixed = _function_cases()[name]
    with torch.no_grad():
        shape = plain(**values, **fixed).shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    doubled = {key: value.double() for key, value in fixed.items()}
    exact = truth.differentiate(lambda **kw: formula(**kw, **doubled), values, grad)

    def arm(label: str, forward: Callable[..., Tensor], note: str, backend: str | None = None) -> Arm:
        leaves = {key: value.clone().requires_grad_() for key, value in values.items()}

        def step() -> Tensor:
            for leaf in leaves.values():
                leaf.grad = None
            y = forward(**leaves, **fixed)
            y.backward(grad)
            return y

        def named() -> Tensor:
            with peftk.use_backend(backend):
                return step()

        def check() -> dict[str, float]:
            y = named() if backend else step()
            return truth.errors({"output": y, **{f"d{key}": leaf.grad for key, leaf in leaves.items()}}, exact)

        owned = lambda: [*leaves.values(), *fixed.values(), grad]  # noqa: E731
        return Arm(label, named if backend else step, check, LIMITS[F32], owned, note)

    arms = [
        arm("native", function, "peftk.functional on backend native", "native"),
        arm("torch", function, "peftk.functional on backend torch", "torch"),
        arm("eager", plain, "plain PyTorch and its autograd"),
    ]
    if reason := why_no_compiler():
        arms.append(Arm("compile", skip=reason))
    else:
        torch._dynamo.reset()
        graph = torch.compile(plain, fullgraph=True, dynamic=False)
        arms.append(arm("compile", graph, "the same, torch.compile (inductor)"))
    benchmark.group = f"function {name}"
    info = {
        "suite": "functions",
        "cell": f"{name}-T{TOKENS}-1024-f32",
        "method": name,
        "mode": "forward+backward",
        "tokens": TOKENS,
        "in_features": 1024,
        "out_features": 1024,
        "size": 16 if name.startswith("low_rank") else 32,
        "dtype": "float32",
        "parameters": "float32",
    }
    compare(benchmark, arms, "eager", info, budget)
