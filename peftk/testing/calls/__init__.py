"""Calls of the raw operators at any size: what benchmarks and the tuner time.

A call is the operator with its own arguments (forward and backward operators alike), not the public function. Its
truth is the "torch" kernel on the same arguments in float64, which the tests hold to dense formulas. The file of a
family's name in this package says how its operators are called.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import ops as _ops
from ...runtime import registry
from ..compare import LIMITS, error
from ._kind import Kind, kernel

KINDS: dict[str, Kind] = {
    name: kind
    for family in _ops.__all__
    for name, kind in importlib.import_module(f"{__name__}.{family}").KINDS.items()
}
"""How each public operator is called, by its name."""


def operators(name: str) -> tuple[str, ...]:
    """Return the operators of a public function: forward, and backward where there is one."""
    return (name, f"{name}_backward") if KINDS[name].differentiable else (name,)


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        operator: its name, such as ``low_rank_linear_backward``.
        tokens: rows of x; of no meaning where there is no x.
        features: the last size of x; for `cayley`, the blocks cover it.
        out: rows of the weight, or the last size of the output.
        size: the block size, the rank or the size of the first factor, as the operator's `Kind` says.
        dtype: the dtype of the activations; parameters stay float32.
        variant: one of those of the operator's `Kind`; the first of them if empty.
    """

    operator: str
    tokens: int
    features: int
    out: int
    size: int
    dtype: torch.dtype = torch.float32
    variant: str = ""

    def __post_init__(self) -> None:
        variants = self.kind.variants
        if not self.variant:
            object.__setattr__(self, "variant", variants[0])
        if self.variant not in variants:
            raise ValueError(f"variant: expected one of {', '.join(variants)}; got {self.variant!r}")

    @property
    def forward(self) -> str:
        """The name of the forward operator."""
        return self.operator.removesuffix("_backward")

    @property
    def backward(self) -> bool:
        """Whether this is a call of a backward operator."""
        return self.operator.endswith("_backward")

    @property
    def kind(self) -> Kind:
        """How the operator is called."""
        return KINDS[self.forward]

    @property
    def product_flops(self) -> int:
        """The operations of the product with the dense weight, which outweighs everything else where there is one."""
        return 2 * self.tokens * self.features * self.out if self.forward.endswith("_linear") else 0

    def __str__(self) -> str:
        kind, size = self.kind, f"{self.kind.size[0]}{self.size}"
        dtype = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}[self.dtype]
        if kind.square and not kind.tokens:
            shape = [f"{self.features // self.size}x{size}"]
        else:
            width = str(self.features) if kind.square else f"{self.features}x{self.out}"
            shape = [f"T{self.tokens}", width, size] if kind.tokens else [width, size]
        return "-".join([self.operator, *shape, *([self.variant] if self.variant else []), dtype])

    def arguments(self, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """Return the operator's arguments; on one device equal seeds give equal values. On "meta" they have none."""
        meta = torch.device(device).type == "meta"
        generator = None if meta else torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
            if meta:
                return torch.empty(shape, device=device, dtype=dtype)
            return (torch.randn(shape, generator=generator, device=device) * spread).to(dtype)

        return self.kind.arguments(self, normal)

    def reason(self, backend: str, arguments: tuple[Any, ...]) -> str | None:
        """Return None if a backend can run the call, else why it cannot."""
        return registry.OPERATORS[self.operator].reason(backend, arguments)

    def bind(self, backend: str, arguments: tuple[Any, ...]) -> Callable[[], Any]:
        """Return a function that runs the call on one backend, without the registry.

        Raises:
            RuntimeError: if the backend has no such kernel.
        """
        return functools.partial(kernel(self.operator, backend), *arguments)

    def truth(self, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Return the results in float64."""
        exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        return _as_tuple(kernel(self.operator, "torch")(*exact))

    def error(self, results: Any, truth: tuple[Tensor, ...]) -> float:
        """Return the largest relative error, in the Frobenius norm, of all results."""
        return max(error(a, t).norm for a, t in zip(_as_tuple(results), truth, strict=True))

    @property
    def limit(self) -> float:
        """The largest error at which a result may be timed."""
        return LIMITS[self.dtype]


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


TOKENS = (1, 32, 512, 2048)
WIDTHS = ((384, 384), (384, 1536), (1536, 384), (1024, 1024), (1024, 4096), (4096, 1024), (4096, 4096))
BLOCKS = (4, 8, 32, 64, 256)
RANKS = (8, 16, 64)
FACTORS = (4, 8, 16)


def sweep(
    operator: str,
    *,
    tokens: tuple[int, ...] = TOKENS,
    widths: tuple[tuple[int, int], ...] = WIDTHS,
    blocks: tuple[int, ...] = BLOCKS,
    ranks: tuple[int, ...] = RANKS,
    factors: tuple[int, ...] = FACTORS,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Call]:
    """Yield the calls of an operator that a tuned table covers, smallest first.

    Args:
        operator: a forward or a backward operator.
        tokens: rows of x.
        widths: (in_features, out_features); operators without a weight use each in_features once.
        blocks: block sizes.
        ranks: ranks.
        factors: sizes of the first factor of a Kronecker product.
        dtype: the dtype of the activations; there are no calls in one that the operator is not timed in.

    Raises:
        ValueError: if there is no such operator.
    """
    names = sorted(name for known in KINDS for name in operators(known))
    if operator not in names:
        raise ValueError(f"operator: expected one of {', '.join(names)}; got {operator!r}")
    kind = KINDS[operator.removesuffix("_backward")]
    if dtype not in kind.dtypes:
        return
    square = [(features, features) for features in dict.fromkeys(features for features, _ in widths)]
    for features, out in square if kind.square else widths:
        for size in {"block": blocks, "rank": ranks, "factor": factors}[kind.size]:
            if not kind.fits(features, out, size):
                continue
            for variant in kind.variants:
                for count in tokens if kind.tokens else (0,):
                    yield Call(operator, count, features, out, size, dtype, variant)
