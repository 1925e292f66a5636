"""Methods that add something to the weight: LoRA and its relatives, LoHa, LoKr and C3A."""

# The base class says what the methods are for.
# ruff: noqa: D102

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import plain, truth
from ._method import SCALE, Cell, Method, Values, Variant

if TYPE_CHECKING:
    from ..peers import Bench


class Lora(Method):
    """LoRA."""

    name, title, config = "lora", "LoRA", "LoraConfig"
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
        return truth.lora(x, weight, bias, SCALE, **values)

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        return linear(x, weight, bias) + plain.low_rank(x, values["a"].to(x.dtype), values["b"].to(x.dtype), SCALE)

    def lycoris(self, bench: Bench, base: nn.Linear) -> tuple[nn.Module, Values, str, Variant | None]:
        from lycoris.modules.locon import LoConModule

        size = bench.cell.size
        layer = LoConModule("bench", base, 1.0, size, SCALE * size, bypass_mode=True)
        found = {"a": layer.lora_down.weight, "b": layer.lora_up.weight}
        return layer, found, "LyCORIS locon, bypass form", None


class Dora(Lora):
    """DoRA."""

    name, title = "dora", "DoRA"
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
        return truth.dora(x, weight, bias, SCALE, **values)

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
        formula = lambda x, weight, bias, a, b, magnitude: truth.dora(  # noqa: E731
            x, weight, bias, SCALE, a, b, magnitude[:, 0], detached=False
        )
        return layer, found, remark, Variant(remark, bench.exactly(formula, found))


class AdaLora(Lora):
    """AdaLoRA."""

    name, title, config, size = "adalora", "AdaLoRA", "AdaLoraConfig", 12
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
        return truth.lora(x, weight, bias, scale, values["a"] * values["e"], values["b"])

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        return super().plain(cell, x, weight, bias, a=values["a"] * values["e"], b=values["b"])


class LoHa(Method):
    """LoHa."""

    name, title, config, size = "loha", "LoHa", "LoHaConfig", 8
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
        delta = (values["w1_a"] @ values["w1_b"]) * (values["w2_a"] @ values["w2_b"])
        return x @ (weight + SCALE * delta).mT + bias

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        delta = (values["w1_a"] @ values["w1_b"]) * (values["w2_a"] @ values["w2_b"])
        return linear(x, weight + (SCALE * delta).to(x.dtype), bias)

    def lycoris(self, bench: Bench, base: nn.Linear) -> tuple[nn.Module, Values, str, Variant | None]:
        from lycoris.modules.loha import LohaModule

        size = bench.cell.size
        layer = LohaModule("bench", base, 1.0, size, SCALE * size, bypass_mode=True)
        return layer, {n: getattr(layer, f"hada_{n}") for n in self.parameters}, "LyCORIS loha, bypass form", None


class LoKr(Method):
    """LoKr with a whole second factor; its scale is 1, which is what LyCORIS makes of it."""

    name, title, letter, config, size = "lokr", "LoKr", "f", "LoKrConfig", 8
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
        return x @ (weight + torch.kron(values["w1"], values["w2"])).mT + bias

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        w1, w2 = values["w1"].to(x.dtype), values["w2"].to(x.dtype)
        return linear(x, weight, bias) + plain.kronecker(x, w1, w2)

    def lycoris(self, bench: Bench, base: nn.Linear) -> tuple[nn.Module, Values, str, Variant | None]:
        from lycoris.modules.lokr import LokrModule

        layer = LokrModule("bench", base, factor=bench.cell.size, full_matrix=True, bypass_mode=True)
        return layer, {"w1": layer.lokr_w1, "w2": layer.lokr_w2}, "LyCORIS lokr, bypass form", None


class C3A(Method):
    """C3A."""

    name, title, letter, config = "c3a", "C3A", "b", "C3AConfig"
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
        return x @ (weight + truth.circulant(values["kernel"]) / cell.features).mT + bias

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
            wrong = truth.circulant(kernel, forwards=False) - truth.circulant(kernel)
            return {**bench.truth, "dx": bench.truth["dx"] + grad @ wrong / cell.features}

        return Variant(remark, exact)
