"""What the file of a family says about the calls of its operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ...runtime import registry


class Normal(Protocol):
    """Makes tensors of normal numbers, or tensors without values on the device "meta"."""

    def __call__(self, *shape: int, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of this shape, with this deviation."""


ALL_BACKENDS = ("torch", "native", "triton")


@dataclass(frozen=True)
class Timed:
    """What the benchmarks of the operators time.

    Attributes:
        sizes: block sizes, ranks or factors at a width; the functions are timed with the first.
        dtypes: those of the activations.
        widths: the widths of the layer.
    """

    sizes: Callable[[int], tuple[int, ...]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    widths: tuple[int, ...] = (1024, 4096)

    @classmethod
    def at(cls, *sizes: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Timed:
        """Return the same sizes at every width."""
        return cls(lambda width: sizes, dtypes)


def _always(features: int, out: int, size: int) -> bool:
    return True


@dataclass(frozen=True)
class Kind:
    """How a public operator is called at any size.

    Attributes:
        arguments: the arguments of the operator that a `Call` names (forward or backward), from the call and a
            function that makes tensors.
        size: what the size of a call is: "block", "rank" or "factor".
        usual: the size of the doctor's call.
        backends: those that must have kernels of it.
        threads: whether C++ gives "equal bits" for any number of threads, or torch's own products, which may split a
            sum by threads, do part of the work.
        sums: the dtype of the results of half-precision calls: that of the "activations"; of the
            "parameters", which are all there is and computed with in float32; or "float32".
        timed: what the benchmarks time.
        gpu_sizes: its sizes in the table of GPUs, on square layers; none of an operator that is made of others there.
        square: whether it has no out_features of its own, so that each in_features is swept once.
        tokens: whether it reads activations; parameters and weights have no tokens.
        dtypes: what it is timed in.
        variants: what tells calls of equal sizes apart; the first is the default.
        fits: whether a size fits in_features and out_features.
        differentiable: whether there is a backward operator.
    """

    arguments: Callable[[Any, Normal], tuple[Any, ...]]
    size: str
    usual: int
    backends: tuple[str, ...] = field(kw_only=True)
    threads: Literal["equal bits", "torch's products"] = field(kw_only=True)
    sums: Literal["activations", "parameters", "float32"] = field(kw_only=True)
    timed: Timed = field(kw_only=True)
    gpu_sizes: tuple[int, ...] = field(kw_only=True)
    square: bool = False
    tokens: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    variants: tuple[str, ...] = ("",)
    fits: Callable[[int, int, int], bool] = _always
    differentiable: bool = True


def kernel(operator: str, backend: str) -> Callable[..., Any]:
    """Return a backend's function for an operator.

    Raises:
        RuntimeError: if the backend has no such kernel.
    """
    found = registry.OPERATORS[operator].kernel(backend)
    if isinstance(found, str):
        raise RuntimeError(f"backend: expected one that can run {operator}; got {backend!r}, which cannot: {found}")
    return found[0]
