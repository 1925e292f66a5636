"""LoKr."""

# The base class says what the methods are for.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear

from peftk.testing.cases import kronecker

from ..plain import kronecker as plain
from ._method import Cell, Method, Values, Variant

if TYPE_CHECKING:
    from ..peers import Bench


class LoKr(Method):
    """LoKr with a whole second factor; its scale is 1, which is what LyCORIS makes of it."""

    name, title, letter, config, size = "lokr", "LoKr", "f", "LoKrConfig", 8
    targets = 1.50, 2.00, 1.45
    gpu_targets: ClassVar = {8: 1.3}
    gpu_sizes = (8,)
    parameters: ClassVar = {"w1": "lokr_w1", "w2": "lokr_w2"}

    def fields(self, cell: Cell) -> dict[str, Any]:
        # A rank of at least half the second factor's size makes it whole.
        rank = max(cell.features, cell.out_features) // cell.size
        return {"r": rank, "alpha": rank, "decompose_factor": cell.size}

    def values(self, cell: Cell, normal: Callable[..., Tensor]) -> Values:
        rows, columns = cell.out_features // cell.size, cell.features // cell.size
        w2 = normal(rows, columns, spread=0.3 * cell.features**-0.5)
        return {"w1": normal(cell.size, cell.size, spread=0.5), "w2": w2}

    def kept(self, cell: Cell) -> tuple[int, int]:
        return 0, cell.size**2 + cell.features * cell.out_features // cell.size**2

    def exact(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        return kronecker.linear(x, weight, bias, **values)

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        w1, w2 = values["w1"].to(x.dtype), values["w2"].to(x.dtype)
        return linear(x, weight, bias) + plain.multiply(x, w1, w2)

    def lycoris(self, bench: Bench, base: nn.Linear) -> tuple[nn.Module, Values, str, Variant | None]:
        from lycoris.modules.lokr import LokrModule

        layer = LokrModule("bench", base, factor=bench.cell.size, full_matrix=True, bypass_mode=True)
        return layer, {"w1": layer.lokr_w1, "w2": layer.lokr_w2}, "LyCORIS lokr, bypass form", None


METHODS = (LoKr(),)
