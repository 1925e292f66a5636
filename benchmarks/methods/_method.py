"""A cell of the benchmark, and what a method has to say about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

import peftk

if TYPE_CHECKING:
    from ..peers import Bench

Values = dict[str, Tensor]

SCALE = 2.0
"""What every additive update is multiplied by."""


@dataclass(frozen=True)
class Cell:
    """One layer, at one size, in one dtype.

    Attributes:
        method: a key of `METHODS`.
        size: the rank, the block size or the size of the first factor.
        features: in_features.
        tokens: rows of the input.
        dtype: dtype of the base layer and the activations.
        parameters: dtype of the adapter.
        out: out_features; 0 stands for as many as in_features.
    """

    method: str
    size: int
    features: int
    tokens: int
    dtype: torch.dtype
    parameters: torch.dtype
    out: int = 0

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.out or self.features

    def __str__(self) -> str:
        from . import METHODS

        short = {torch.float32: "f32", torch.bfloat16: "bf16"}
        dtypes = "-".join(dict.fromkeys((short[self.dtype], f"{short[self.parameters]}adapter")))
        width = f"{self.features}x{self.out}" if self.out else str(self.features)
        size = METHODS[self.method].size_text(self.size).replace(" ", "")
        return f"{self.method}-{size}-{width}-T{self.tokens}-{dtypes}"


@dataclass(frozen=True)
class Variant:
    """A layer of another library that computes something else than the cell asks for.

    Attributes:
        remark: what it computes, for the reader of the report.
        exact: the output and gradients of that in float64.
        gradients_alone: whether its value is that of the cell, so that the layer has the cell's gradients once
            `peftk.accelerate` runs it.
    """

    remark: str
    exact: Callable[[], Values]
    gradients_alone: bool = False


class Method:
    """One method: its values, its formula in float64 and in plain PyTorch, and where each library keeps its parameters.

    Attributes:
        name: how cells name it.
        title: how reports name it.
        letter: the letter before its size.
        config: the class of its configuration, in peftk and in PEFT.
        parameters: the name of each value in the formulas to the path of the parameter in a layer, the same in both.
        no_lycoris: why LyCORIS has no such layer, if it has none.
        size: the size in the tables of the CPU.
        gpu_sizes: those in the tables of GPUs, that of the first row first.
        targets: what forward and backward may take over the frozen layer, which is asked for: in float32 at 1024
            features, in bfloat16 at 1024 and at 4096; None where nothing is.
        gpu_targets: the same by size over the bare products on an H200, in bfloat16, 8192 tokens, 4096 x 4096.
        headline: whether it stands in the first table of GPUs, at every width, and not in that of the others.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    letter: ClassVar[str] = "r"
    config: ClassVar[str]
    parameters: ClassVar[dict[str, str]]
    no_lycoris: str | None = None
    size: ClassVar[int] = 16
    gpu_sizes: ClassVar[tuple[int, ...]]
    targets: tuple[float, float, float] | None = None
    gpu_targets: Mapping[int, float] = MappingProxyType({})
    headline: ClassVar[bool] = False

    def size_for(self, features: int) -> int:
        """Return the size of a cell with so many features."""
        return self.size

    def size_text(self, size: int) -> str:
        """Name the size."""
        return f"{self.letter}{size}"

    def fields(self, cell: Cell) -> dict[str, Any]:
        """Return the fields of the configuration, the same in peftk and in PEFT."""
        raise NotImplementedError

    def values(self, cell: Cell, normal: Callable[..., Tensor]) -> Values:
        """Return the values of the parameters; `normal` makes normal numbers in the adapter's dtype."""
        raise NotImplementedError

    def exact(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        """Return the layer's output by a dense formula that shares nothing with any arm."""
        raise NotImplementedError

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        """Return the layer's output as one writes it in plain PyTorch, for torch.compile."""
        raise NotImplementedError

    def kept(self, cell: Cell) -> tuple[int, int]:
        """Return how many numbers of x's dtype, and of float32, a step may keep beside its inputs and parameters."""
        raise NotImplementedError

    def kept_bytes(self, cell: Cell) -> int:
        """Return how many bytes a step may keep for its backward pass beside its inputs and parameters."""
        activations, parameters = self.kept(cell)
        return activations * cell.dtype.itemsize + 4 * parameters

    def lycoris(self, bench: Bench, base: nn.Linear) -> tuple[nn.Module, Values, str, Variant | None]:
        """Return LyCORIS' layer, its parameters, a note, and what it computes if that is something else."""
        raise NotImplementedError

    def peft_differs(self, bench: Bench, layer: nn.Module) -> Variant | None:
        """Say what PEFT's layer computes if that is something else; may replace values that do not fit it."""
        return None

    def peft_work(self, cell: Cell) -> float:
        """Estimate the work of a step of PEFT in products of the frozen layer, where that is out of proportion."""
        return 4.0

    def prepare_peft(self, peft: ModuleType) -> None:
        """Do what must be done before PEFT makes the layer."""

    def make_config(self, library: ModuleType, cell: Cell, **more: Any) -> Any:
        """Return the configuration of peftk or of PEFT."""
        return getattr(library, self.config)(**self.fields(cell), **more)

    def find(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of peftk's or PEFT's layer under the names of the values."""
        found = {}
        for name, path in self.parameters.items():
            container, _, rest = path.partition(".")
            part = getattr(layer, container)["default"]
            found[name] = getattr(part, rest) if rest else part
        return found

    def why_missing(self) -> str | None:
        """Return why this version of peftk does not have the method, or None."""
        if not hasattr(peftk, self.config):
            return f"peftk has no {self.config}"
        try:
            self.make_config(peftk, Cell(self.name, 4, 16, 2, torch.float32, torch.float32))
        except NotImplementedError as error:
            return str(error)
        return None
