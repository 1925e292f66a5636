"""LoRA."""

# The base class says what the methods are for.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear

from peftk.testing.cases import low_rank

from ..plain import low_rank as plain
from ._method import SCALE, Cell, Method, Values, Variant

if TYPE_CHECKING:
    from ..peers import Bench


class Lora(Method):
    """LoRA."""

    name, title, config = "lora", "LoRA", "LoraConfig"
    targets = 1.10, 1.60, 1.12
    gpu_targets: ClassVar = {16: 1.12}
    gpu_sizes, headline = (16, 64), True
    parameters: ClassVar = {"a": "lora_A.weight", "b": "lora_B.weight"}

    def fields(self, cell: Cell) -> dict[str, Any]:
        return {"r": cell.size, "lora_alpha": SCALE * cell.size}

    def values(self, cell: Cell, normal: Callable[..., Tensor]) -> Values:
        return {
            "a": normal(cell.size, cell.features, spread=cell.features**-0.5),
            "b": normal(cell.out_features, cell.size, spread=0.05),
        }

    def kept(self, cell: Cell) -> tuple[int, int]:
        return cell.tokens * cell.size, cell.size * (cell.features + cell.out_features)

    def exact(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        return low_rank.linear(x, weight, bias, values["a"], values["b"], SCALE)

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        return linear(x, weight, bias) + plain.low_rank(x, values["a"].to(x.dtype), values["b"].to(x.dtype), SCALE)

    def lycoris(self, bench: Bench, base: nn.Linear) -> tuple[nn.Module, Values, str, Variant | None]:
        from lycoris.modules.locon import LoConModule

        size = bench.cell.size
        layer = LoConModule("bench", base, 1.0, size, SCALE * size, bypass_mode=True)
        found = {"a": layer.lora_down.weight, "b": layer.lora_up.weight}
        return layer, found, "LyCORIS locon, bypass form", None


METHODS = (Lora(),)
