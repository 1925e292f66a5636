"""What the dispatch costs: public functions on tiny tensors, beside their kernels and beside plain PyTorch.

What a call takes beyond its kernel is everything that peftk adds: checks, casts, the choice of a backend and, with
gradients, the autograd Function and torch's autograd engine. The arm of plain PyTorch is what a user would write
instead; what a call takes beyond that is what peftk costs him where tensors are tiny.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import peftk
from benchmarks import truth
from benchmarks.arms import Arm, Budget, compare
from benchmarks.methods import Cell, available
from benchmarks.methods.rotations import plain_cayley
from benchmarks.peers import Bench
from peftk.testing.calls import Call
from peftk.testing.compare import LIMITS

TOKENS, FEATURES, SIZE = 2, 8, 4
OPERATORS = ("block_rotate", "block_rotate_linear", "cayley", "low_rank_add", "low_rank_linear")

# Many more samples than elsewhere: they are cheap, and a difference of microseconds is what is wanted.
CHEAP = Budget(seconds=2.0, least=50, most=400)


def _rotate(x: Tensor, blocks: Tensor) -> Tensor:
    return torch.bmm(x.view(len(x), -1, SIZE).transpose(0, 1), blocks).transpose(0, 1).reshape(x.shape)


PLAIN: dict[str, Callable[..., Tensor]] = {
    "block_rotate": _rotate,
    "block_rotate_linear": lambda x, weight, bias, blocks: linear(_rotate(x, blocks), weight, bias),
    "cayley": lambda packed: plain_cayley(packed, SIZE, False),
    "low_rank_add": lambda base, x, a, b, scale: base + linear(linear(x, a), b) * scale,
    "low_rank_linear": lambda x, weight, bias, a, b, scale: linear(x, weight, bias) + linear(linear(x, a), b) * scale,
}

FROZEN = {"block_rotate_linear": (1, 2), "low_rank_add": (0,), "low_rank_linear": (1, 2)}
"""Positions of the tensors that no gradient is taken in."""


def _public(operator: str, raw: tuple) -> tuple[Callable[..., Tensor], tuple]:
    """Return the public function of an operator and its arguments for a raw call."""
    function = getattr(peftk.functional, operator)
    if operator == "cayley":
        return lambda packed: function(packed, SIZE), raw[:1]
    if operator == "block_rotate":
        return function, raw[:2]
    if operator.startswith("low_rank"):
        # The raw operator has gate, scale, dropout_p and seed; the public call here gives the scale alone.
        return function, (*raw[:-4], raw[-3])
    return function, raw


def _info(cell: str, method: str, mode: str, features: int = FEATURES) -> dict[str, Any]:
    return {
        "suite": "overhead",
        "cell": cell,
        "method": method,
        "mode": mode,
        "tokens": TOKENS,
        "in_features": features,
        "out_features": features,
        "size": SIZE,
        "dtype": "float32",
        "parameters": "float32",
    }


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small use one thread; a second one could only be woken up in vain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _budget(budget: Budget) -> Budget:
    return CHEAP if budget.least > 3 else budget


@pytest.mark.parametrize("backend", ("torch", "native"))
@pytest.mark.parametrize("operator", OPERATORS)
def test_forward(operator: str, backend: str, benchmark, budget: Budget) -> None:
    call = Call(operator, TOKENS, FEATURES, FEATURES, SIZE)
    raw = call.arguments()
    function, arguments = _public(operator, raw)
    exact = call.truth(raw)[:1]
    kernel = call.bind(backend, raw)

    def first(result: Any) -> Tensor:
        return result if isinstance(result, Tensor) else result[0]

    arms = [
        Arm(
            "peftk",
            lambda: function(*arguments),
            lambda: {"output": call.error(function(*arguments), exact)},
            call.limit,
            note=f"the public function, backend {backend} named, no gradients",
        ),
        Arm(
            "kernel",
            kernel,
            lambda: {"output": call.error(first(kernel()), exact)},
            call.limit,
            note=f"the {backend} kernel called directly",
        ),
        Arm(
            "plain",
            lambda: PLAIN[operator](*arguments),
            lambda: {"output": call.error(PLAIN[operator](*arguments), exact)},
            call.limit,
            note="plain PyTorch",
        ),
    ]
    benchmark.group = f"overhead {operator} forward {backend}"
    info = _info(f"{operator}-forward-{backend}", operator, "forward")
    with torch.no_grad(), peftk.use_backend(backend):
        compare(benchmark, arms, "plain", info, _budget(budget))


@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_backward(operator: str, benchmark, budget: Budget) -> None:
    forward, backward = (Call(name, TOKENS, FEATURES, FEATURES, SIZE) for name in (operator, f"{operator}_backward"))
    raw, raw_backward = forward.arguments(), backward.arguments()
    function, arguments = _public(operator, raw)
    leaves = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    trained = {
        str(at): leaf.requires_grad_()
        for at, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and at not in FROZEN.get(operator, ())
    }
    with torch.no_grad():
        grad = torch.randn(PLAIN[operator](*arguments).shape, generator=torch.Generator().manual_seed(1))

    def formula(**values: Tensor) -> Tensor:
        fixed = [a.double() if isinstance(a, Tensor) else a for a in arguments]
        return PLAIN[operator](*[values.get(str(at), value) for at, value in enumerate(fixed)])

    exact = truth.differentiate(formula, trained, grad)

    def arm(name: str, run: Callable[..., Tensor], note: str) -> Arm:
        def step() -> Tensor:
            for leaf in trained.values():
                leaf.grad = None
            y = run(*leaves)
            y.backward(grad)
            return y

        def check() -> dict[str, float]:
            y = step()
            return truth.errors({"output": y, **{f"d{at}": leaf.grad for at, leaf in trained.items()}}, exact)

        return Arm(name, step, check, LIMITS[torch.float32], note=note)

    kernels = forward.bind("torch", raw), backward.bind("torch", raw_backward)

    def both() -> None:
        kernels[0]()
        kernels[1]()

    def check_both() -> dict[str, float]:
        calls = zip((forward, backward), kernels, (raw, raw_backward), strict=True)
        return {call.operator: call.error(kernel(), call.truth(args)) for call, kernel, args in calls}

    arms = [
        arm("peftk", function, "the public function, backend torch named, with gradients"),
        Arm("kernel", both, check_both, forward.limit, note="the two torch kernels called directly, no autograd"),
        arm("plain", PLAIN[operator], "plain PyTorch and its autograd"),
    ]
    benchmark.group = f"overhead {operator} forward+backward"
    info = _info(f"{operator}-forward+backward-torch", operator, "forward+backward")
    with peftk.use_backend("torch"):
        compare(benchmark, arms, "plain", info, _budget(budget))


@pytest.mark.parametrize("method", available())
def test_tiny_layer(method: str, benchmark, budget: Budget) -> None:
    """A whole layer on tensors so small that only Python and launches count."""
    cell = Cell(method, SIZE, 16, TOKENS, torch.float32, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arms = Bench(cell).arms({"compile": "left out: a compiled step has no dispatch to measure"})
        benchmark.group = f"overhead layer {method}"
        compare(benchmark, arms, "frozen", _info(f"layer-{method}", method, "forward+backward", 16), _budget(budget))
