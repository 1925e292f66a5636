"""DoRA."""

# The base class says what the methods are for.
# ruff: noqa: D102

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftk.testing.cases import dora

from ..plain import low_rank as plain
from ._method import SCALE, Cell, Values, Variant
from .lora import Lora

if TYPE_CHECKING:
    from ..peers import Bench


def exact(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, detached: bool = True
) -> Tensor:
    """Multiply by the merged weight with the magnitudes as norms of its rows."""
    return x @ dora.decomposed(weight + SCALE * b @ a, magnitude, detached).mT + bias


class Dora(Lora):
    """DoRA."""

    name, title = "dora", "DoRA"
    targets = None
    gpu_targets: ClassVar = {}
    gpu_sizes, headline = (16,), False
    parameters: ClassVar = {**Lora.parameters, "magnitude": "lora_magnitude_vector.weight"}

    def fields(self, cell: Cell) -> dict[str, Any]:
        return {**super().fields(cell), "use_dora": True}

    def values(self, cell: Cell, normal: Callable[..., Tensor]) -> Values:
        # The rows of the frozen weight have norms of about 1.
        return {**super().values(cell, normal), "magnitude": 1 + normal(cell.out_features, spread=0.1)}

    def kept(self, cell: Cell) -> tuple[int, int]:
        hidden, factors = super().kept(cell)
        # The unscaled output is for the gradient of the magnitudes.
        return hidden + cell.tokens * cell.out_features, factors + 4 * cell.out_features

    def exact(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        return exact(x, weight, bias, **values)

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        a, b, magnitude = values["a"].to(x.dtype), values["b"].to(x.dtype), values["magnitude"]
        with torch.no_grad():
            norm = (weight + SCALE * b @ a).float().norm(dim=1)
        scaled = linear(x, weight) + plain.low_rank(x, a, b, SCALE)
        return (magnitude / norm).to(x.dtype) * scaled + bias

    def lycoris(self, bench: Bench, base: nn.Linear) -> tuple[nn.Module, Values, str, Variant | None]:
        from lycoris.modules.locon import LoConModule

        size = bench.cell.size
        layer = LoConModule("bench", base, 1.0, size, SCALE * size, weight_decompose=True)
        # It holds the magnitudes as a column, and a plain tensor would not move with the layer.
        column = nn.Parameter(bench.values["magnitude"].clone()[:, None])
        layer.dora_scale = column
        found = {"a": layer.lora_down.weight, "b": layer.lora_up.weight, "magnitude": column}
        remark = "LyCORIS locon with weight_decompose, on the weight: it differentiates the norm too"
        formula = functools.partial(exact, detached=False)
        return layer, found, remark, Variant(remark, bench.exactly(formula, found))


METHODS = (Dora(),)
