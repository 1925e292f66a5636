"""C3A."""

# The base class says what the methods are for.
# ruff: noqa: D102

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftk.testing.cases import circulant

from ..plain import circulant as plain
from ._method import Cell, Method, Values, Variant

if TYPE_CHECKING:
    from ..peers import Bench


def _backwards(kernel: Tensor) -> Tensor:
    """Return the dense matrix of the convolution that runs the wrong way round: ``D[p, q] = w[(q + p) mod b]``."""
    return torch.cat(
        [
            torch.cat([torch.stack([first.roll(-p) for p in range(kernel.shape[-1])]) for first in line], dim=1)
            for line in kernel
        ]
    )


class C3A(Method):
    """C3A."""

    name, title, letter, config = "c3a", "C3A", "b", "C3AConfig"
    targets = 1.60, 2.50, 1.60
    gpu_targets: ClassVar = {128: 1.15}
    gpu_sizes = (128,)
    parameters: ClassVar = {"kernel": "c3a_kernel"}
    no_lycoris = "LyCORIS has no C3A"

    def size_for(self, features: int) -> int:
        return max(1, features // 8)

    def fields(self, cell: Cell) -> dict[str, Any]:
        return {"block_size": cell.size}

    def values(self, cell: Cell, normal: Callable[..., Tensor]) -> Values:
        shape = cell.out_features // cell.size, cell.features // cell.size, cell.size
        # It is divided by the number of features.
        return {"kernel": normal(*shape, spread=0.1 * cell.features**0.5)}

    def kept(self, cell: Cell) -> tuple[int, int]:
        return 0, cell.features * cell.out_features // cell.size

    def exact(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        return circulant.linear(x, weight, bias, values["kernel"], 1 / cell.features)

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        return linear(x, weight, bias) + plain.convolve(x, values["kernel"], 1 / cell.features)

    def peft_differs(self, bench: Bench, layer: nn.Module) -> Variant | None:
        cell = bench.cell
        if cell.size <= 2:
            return None
        remark = "PEFT's gradient in x is not that of its output (it convolves the wrong way round): checked as it is"

        @functools.cache
        def exact() -> Values:
            kernel, grad = bench.values["kernel"].double(), bench.grad.double()
            wrong = _backwards(kernel) - circulant.dense(kernel)
            return {**bench.truth, "dx": bench.truth["dx"] + grad @ wrong / cell.features}

        return Variant(remark, exact, gradients_alone=True)


METHODS = (C3A(),)
