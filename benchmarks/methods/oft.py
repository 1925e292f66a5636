"""OFT."""

# The base class says what the methods are for.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftk.testing.cases import block_diagonal, cayley

from ..plain import cayley as plain
from ..plain.block_diagonal import rotate
from ._method import Cell, Method, Values, Variant

if TYPE_CHECKING:
    from ..peers import Bench


def _of_output(x: Tensor, weight: Tensor, bias: Tensor, oft_blocks: Tensor) -> Tensor:
    """Multiply by the weight, then by the dense rotation, as LyCORIS' diag-oft does."""
    # Its transform is the transposed one.
    turned = cayley.transform((oft_blocks - oft_blocks.mT).mT, oft_blocks.shape[-1])
    return block_diagonal.rotate(x @ weight.mT + bias, turned)


class Oft(Method):
    """OFT, by the exact transform or by the series."""

    letter, config, size = "b", "OFTConfig", 32
    gpu_targets: ClassVar = {32: 1.12, 64: 1.12, 256: 1.12}
    gpu_sizes, headline = (32, 64, 256), True
    parameters: ClassVar = {"packed": "oft_R.weight"}

    def __init__(self, neumann: bool) -> None:
        self.neumann = neumann
        self.name, self.title = ("oft-neumann", "OFT Neumann") if neumann else ("oft-exact", "OFT exact")
        self.targets = 1.12, 1.80, 1.15 if neumann else 1.17
        self.no_lycoris = "LyCORIS has no Cayley-Neumann series" if neumann else None

    def size_for(self, features: int) -> int:
        # LyCORIS finds no such blocks on narrow layers.
        return min(self.size, features // 8)

    def fields(self, cell: Cell) -> dict[str, Any]:
        return {"r": 0, "oft_block_size": cell.size, "use_cayley_neumann": self.neumann}

    def values(self, cell: Cell, normal: Callable[..., Tensor]) -> Values:
        return {"packed": normal(cell.features // cell.size, cell.size * (cell.size - 1) // 2, spread=0.02)}

    def kept(self, cell: Cell) -> tuple[int, int]:
        return 0, 2 * cell.features * cell.size

    def exact(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        blocks = cayley.transform(values["packed"], cell.size, 5 if self.neumann else None)
        return block_diagonal.rotate_linear(x, weight, bias, blocks)

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        blocks = plain.transform(values["packed"].float(), cell.size, 5 if self.neumann else None)
        return linear(rotate(x, blocks.to(x.dtype)), weight, bias)

    def lycoris(self, bench: Bench, base: nn.Linear) -> tuple[nn.Module, Values, str, Variant | None]:
        from lycoris.modules.diag_oft import DiagOFTModule

        cell = bench.cell
        layer = DiagOFTModule("bench", base, 1.0, cell.size, bypass_mode=True)
        if layer.block_size != cell.size:
            raise ValueError(f"LyCORIS chooses blocks of {layer.block_size} here")
        rows, columns = torch.triu_indices(cell.size, cell.size, 1, device=bench.device)
        blocks = torch.zeros(layer.oft_blocks.shape, dtype=cell.parameters, device=bench.device)
        blocks[:, rows, columns] = bench.values["packed"]
        layer.oft_blocks.data = blocks
        found = {"oft_blocks": layer.oft_blocks}
        remark = "LyCORIS diag-oft, bypass form: rotates the OUTPUT, a different layer of about the same cost"
        return layer, found, remark, Variant(remark, bench.exactly(_of_output, found))


METHODS = (
    Oft(neumann=True),
    Oft(neumann=False),
)
