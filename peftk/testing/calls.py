"""Calls of the raw operators at any size: what benchmarks and the tuner time.

A call is the operator with its own arguments (forward and backward operators alike), not the public function. Its
truth is the "torch" kernel on the same arguments in float64, which the tests hold to dense formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _registry
from .. import ops as _ops  # noqa: F401 - importing them defines the operators
from .compare import LIMITS, error

NEUMANN = [1.0, 2.0, 2.0, 2.0, 1.0]
"""The coefficients of five terms, the default of the field."""

FAMILIES = {
    "block_rotate": "block",
    "block_rotate_linear": "block",
    "cayley": "cayley",
    "low_rank_add": "rank",
    "low_rank_linear": "rank",
}


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        operator: its name, such as ``low_rank_linear_backward``.
        tokens: rows of x; of no meaning for `cayley`.
        features: the last size of x; for `cayley`, the blocks cover it.
        out: rows of the weight, or the last size of the output.
        size: the block size or the rank.
        dtype: the dtype of the activations; parameters stay float32.
        neumann: for `cayley`, the series instead of the exact transform.
    """

    operator: str
    tokens: int
    features: int
    out: int
    size: int
    dtype: torch.dtype = torch.float32
    neumann: bool = False

    @property
    def forward(self) -> str:
        """The name of the forward operator."""
        return self.operator.removesuffix("_backward")

    @property
    def product_flops(self) -> int:
        """The operations of the product with the dense weight, which outweighs everything else where there is one."""
        return 2 * self.tokens * self.features * self.out if self.forward.endswith("_linear") else 0

    def __str__(self) -> str:
        dtype = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}[self.dtype]
        letter = "r" if FAMILIES[self.forward] == "rank" else "b"
        if self.forward == "cayley":
            kind = "neumann" if self.neumann else "exact"
            return f"{self.operator}-{self.features // self.size}x{letter}{self.size}-{kind}-{dtype}"
        width = str(self.features) if self.forward == "block_rotate" else f"{self.features}x{self.out}"
        return f"{self.operator}-T{self.tokens}-{width}-{letter}{self.size}-{dtype}"

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple:
        """Return the operator's arguments; on one device equal seeds give equal values. On "meta" they have none."""
        meta = torch.device(device).type == "meta"
        generator = None if meta else torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
            if meta:
                return torch.empty(shape, device=device, dtype=dtype)
            return (torch.randn(shape, generator=generator, device=device) * spread).to(dtype)

        tokens, features, out, size, dtype = self.tokens, self.features, self.out, self.size, self.dtype
        backward = self.operator.endswith("_backward")
        if self.forward == "cayley":
            count = features // size
            packed = normal(count, size * (size - 1) // 2, spread=0.3 / size)
            polynomial = NEUMANN if self.neumann else []
            if not backward:
                return packed, size, polynomial
            kernel = _kernel("cayley", "torch")
            blocks = kernel(packed.double(), size, polynomial).float()
            return normal(count, size, size), packed, blocks, polynomial
        x = normal(tokens, features, dtype=dtype)
        weight = bias = None
        if self.forward.endswith("_linear"):
            weight, bias = normal(out, features, spread=features**-0.5, dtype=dtype), normal(out, dtype=dtype)
        if FAMILIES[self.forward] == "block":
            blocks = normal(features // size, size, size, spread=size**-0.5)
            if self.forward == "block_rotate":
                return (
                    (normal(tokens, features, dtype=dtype), x, blocks, False, True, True)
                    if backward
                    else (x, blocks, False)
                )
            grad = normal(tokens, out, dtype=dtype)
            return (grad, x, weight, blocks, True, True, False) if backward else (x, weight, bias, blocks)
        a, b = normal(size, features, spread=features**-0.5, dtype=dtype), normal(out, size, spread=0.1, dtype=dtype)
        factors = a, b, None, 2.0, 0.0, None
        # The base output of the forward pass and the incoming gradient of the backward pass have one shape.
        y = normal(tokens, out, dtype=dtype)
        if not backward:
            return (y, x, *factors) if weight is None else (x, weight, bias, *factors)
        hidden = (x.double() @ a.double().mT).to(dtype)
        if weight is None:
            return y, x, hidden, *factors, True, True, True, False
        return y, x, hidden, weight, *factors, True, True, True, False, False

    def reason(self, backend: str, arguments: tuple) -> str | None:
        """Return None if a backend can run the call, else why it cannot."""
        return _registry.OPERATORS[self.operator].reason(backend, arguments)

    def bind(self, backend: str, arguments: tuple) -> Callable[[], Any]:
        """Return a function that runs the call on one backend, without the registry.

        Raises:
            RuntimeError: if the backend has no such kernel.
        """
        return functools.partial(_kernel(self.operator, backend), *arguments)

    def truth(self, arguments: tuple) -> tuple[Tensor, ...]:
        """Return the results in float64."""
        exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        return _as_tuple(_kernel(self.operator, "torch")(*exact))

    def error(self, results: Any, truth: tuple[Tensor, ...]) -> float:
        """Return the largest relative error, in the Frobenius norm, of all results."""
        return max(error(a, t).norm for a, t in zip(_as_tuple(results), truth, strict=True))

    @property
    def limit(self) -> float:
        """The largest error at which a result may be timed."""
        return LIMITS[self.dtype]


def _kernel(operator: str, backend: str) -> Any:
    found = _registry.OPERATORS[operator].kernel(backend)
    if isinstance(found, str):
        raise RuntimeError(f"backend: expected one that can run {operator}; got {backend!r}, which cannot: {found}")
    return found[0]


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


TOKENS = (1, 32, 512, 2048)
WIDTHS = ((384, 384), (384, 1536), (1536, 384), (1024, 1024), (1024, 4096), (4096, 1024), (4096, 4096))
BLOCKS = (4, 8, 32, 64, 256)
RANKS = (8, 16, 64)


def sweep(
    operator: str,
    *,
    tokens: tuple[int, ...] = TOKENS,
    widths: tuple[tuple[int, int], ...] = WIDTHS,
    blocks: tuple[int, ...] = BLOCKS,
    ranks: tuple[int, ...] = RANKS,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Call]:
    """Yield the calls of an operator that a tuned table covers, smallest first.

    Args:
        operator: a forward or a backward operator.
        tokens: rows of x.
        widths: (in_features, out_features); operators without a weight use each in_features once.
        blocks: block sizes.
        ranks: ranks.
        dtype: the dtype of the activations.

    Raises:
        ValueError: if there is no such operator.
    """
    forward = operator.removesuffix("_backward")
    if forward not in FAMILIES:
        names = sorted(name for known in FAMILIES for name in (known, f"{known}_backward"))
        raise ValueError(f"operator: expected one of {', '.join(names)}; got {operator!r}")
    square = [(features, features) for features in dict.fromkeys(features for features, _ in widths)]
    for features, out in square if forward in ("cayley", "block_rotate") else widths:
        sizes = ranks if FAMILIES[forward] == "rank" else [b for b in blocks if features % b == 0]
        for size in sizes:
            if forward == "cayley":
                for neumann in (False, True):
                    yield Call(operator, 0, features, features, size, torch.float32, neumann)
                continue
            for count in tokens:
                yield Call(operator, count, features, out, size, dtype)
