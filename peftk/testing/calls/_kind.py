"""What the file of a family says about the calls of its operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...runtime import registry


class Normal(Protocol):
    """Makes tensors of normal numbers, or tensors without values on the device "meta"."""

    def __call__(self, *shape: int, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of this shape, with this deviation."""


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
        square: whether it has no out_features of its own, so that each in_features is swept once.
        tokens: whether it reads activations; parameters and weights have no tokens.
        dtypes: what it is timed in.
        variants: what tells calls of equal sizes apart; the first is the default.
        fits: whether a size fits in_features and out_features.
        differentiable: whether there is a backward operator.
    """

    arguments: Callable[[Any, Normal], tuple]
    size: str
    usual: int
    square: bool = False
    tokens: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    variants: tuple[str, ...] = ("",)
    fits: Callable[[int, int, int], bool] = _always
    differentiable: bool = True


def kernel(operator: str, backend: str) -> Callable:
    """Return a backend's function for an operator.

    Raises:
        RuntimeError: if the backend has no such kernel.
    """
    found = registry.OPERATORS[operator].kernel(backend)
    if isinstance(found, str):
        raise RuntimeError(f"backend: expected one that can run {operator}; got {backend!r}, which cannot: {found}")
    return found[0]
