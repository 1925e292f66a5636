"""AdaLoRA."""

# The base class says what the methods are for.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from peftk.testing.cases import low_rank

from ._method import SCALE, Cell, Values
from .lora import Lora


class AdaLora(Lora):
    """AdaLoRA."""

    name, title, config, size = "adalora", "AdaLoRA", "AdaLoraConfig", 12
    targets = 1.10, 1.60, 1.10
    gpu_targets: ClassVar = {}
    gpu_sizes, headline = (12,), False
    parameters: ClassVar = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}
    no_lycoris = "LyCORIS has no AdaLoRA"

    def fields(self, cell: Cell) -> dict[str, Any]:
        # PEFT divides by the rank and a little.
        target = max(1, cell.size // 2)
        return {"init_r": cell.size, "target_r": target, "lora_alpha": SCALE * cell.size, "total_step": 1000}

    def values(self, cell: Cell, normal: Callable[..., Tensor]) -> Values:
        return {**super().values(cell, normal), "e": normal(cell.size, 1)}

    def exact(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        scale = SCALE * cell.size / (cell.size + 1e-5)
        return low_rank.linear(x, weight, bias, values["a"] * values["e"], values["b"], scale)

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        return super().plain(cell, x, weight, bias, a=values["a"] * values["e"], b=values["b"])


METHODS = (AdaLora(),)
