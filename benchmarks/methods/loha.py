"""LoHa."""

# The base class says what the methods are for.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear

from peftk.testing.cases import hadamard

from ._method import SCALE, Cell, Method, Values, Variant

if TYPE_CHECKING:
    from ..peers import Bench


class LoHa(Method):
    """LoHa."""

    name, title, config, size = "loha", "LoHa", "LoHaConfig", 8
    targets = 1.35, 2.00, 1.25
    gpu_targets: ClassVar = {8: 1.12}
    gpu_sizes = (8,)
    parameters: ClassVar = {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")}

    def fields(self, cell: Cell) -> dict[str, Any]:
        return {"r": cell.size, "alpha": SCALE * cell.size}

    def values(self, cell: Cell, normal: Callable[..., Tensor]) -> Values:
        return {
            "w1_a": normal(cell.out_features, cell.size, spread=0.5),
            "w1_b": normal(cell.size, cell.features, spread=0.5),
            "w2_a": normal(cell.out_features, cell.size, spread=0.05),
            "w2_b": normal(cell.size, cell.features, spread=cell.features**-0.5),
        }

    def kept(self, cell: Cell) -> tuple[int, int]:
        # As a low-rank product of the rank's square.
        return cell.tokens * cell.size**2, cell.size**2 * (cell.features + cell.out_features)

    def exact(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        return x @ hadamard.weight(weight, **values, scale=SCALE).mT + bias

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        delta = (values["w1_a"] @ values["w1_b"]) * (values["w2_a"] @ values["w2_b"])
        return linear(x, weight + (SCALE * delta).to(x.dtype), bias)

    def lycoris(self, bench: Bench, base: nn.Linear) -> tuple[nn.Module, Values, str, Variant | None]:
        from lycoris.modules.loha import LohaModule

        size = bench.cell.size
        layer = LohaModule("bench", base, 1.0, size, SCALE * size, bypass_mode=True)
        return layer, {n: getattr(layer, f"hada_{n}") for n in self.parameters}, "LyCORIS loha, bypass form", None


METHODS = (LoHa(),)
