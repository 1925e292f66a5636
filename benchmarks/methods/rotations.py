"""Methods that rotate the input: OFT and BOFT."""

# The base class says what the methods are for.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import plain, truth
from ._method import Cell, Method, Values, Variant

if TYPE_CHECKING:
    from ..peers import Bench


class Oft(Method):
    """OFT, by the exact transform or by the series."""

    letter, config, size = "b", "OFTConfig", 32
    parameters: ClassVar = {"packed": "oft_R.weight"}

    def __init__(self, neumann: bool) -> None:
        self.neumann = neumann
        self.name, self.title = ("oft-neumann", "OFT Neumann") if neumann else ("oft-exact", "OFT exact")
        self.no_lycoris = "LyCORIS has no Cayley-Neumann series" if neumann else None

    def fields(self, cell: Cell) -> dict[str, Any]:
        return {"r": 0, "oft_block_size": cell.size, "use_cayley_neumann": self.neumann}

    def values(self, cell: Cell, normal: Callable[..., Tensor]) -> Values:
        return {"packed": normal(cell.features // cell.size, cell.size * (cell.size - 1) // 2, spread=0.02)}

    def kept(self, cell: Cell) -> tuple[int, int]:
        return 0, 2 * cell.features * cell.size

    def exact(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        return truth.oft(x, weight, bias, cell.size, self.neumann, values["packed"])

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        blocks = plain.cayley(values["packed"].float(), cell.size, 5 if self.neumann else None)
        return linear(plain.rotate(x, blocks.to(x.dtype)), weight, bias)

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
        return layer, found, remark, Variant(remark, bench.exactly(truth.oft_of_output, found))


class Boft(Method):
    """BOFT with two butterfly factors."""

    name, title, letter, config, size = "boft", "BOFT", "b", "BOFTConfig", 4
    parameters: ClassVar = {"factors": "boft_R", "scale": "boft_s"}
    stages = 2

    def size_text(self, size: int) -> str:
        return f"b{size} m{self.stages}"

    def fields(self, cell: Cell) -> dict[str, Any]:
        return {"boft_block_size": cell.size, "boft_n_butterfly_factor": self.stages}

    def values(self, cell: Cell, normal: Callable[..., Tensor]) -> Values:
        shape = self.stages, cell.features // cell.size, cell.size, cell.size
        return {"factors": normal(*shape, spread=0.1), "scale": 1 + normal(cell.out_features, 1, spread=0.1)}

    def kept(self, cell: Cell) -> tuple[int, int]:
        # The unscaled output is for the gradient of the scale; the rest are the factors' rotations and their product.
        block = cell.size * 2 ** (self.stages - 1)
        parameters = 2 * self.stages * cell.features * cell.size + cell.features * block + 2 * cell.out_features
        return cell.tokens * cell.out_features, parameters

    def exact(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        return truth.boft(x, weight, bias, **values)

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        skew = (values["factors"] - values["factors"].mT).float() / 2
        eye = torch.eye(cell.size, dtype=skew.dtype, device=skew.device)
        blocks = torch.linalg.solve(eye + skew, eye - skew, left=False).to(x.dtype)
        return linear(plain.butterfly(x, blocks), weight) * values["scale"][:, 0].to(x.dtype) + bias

    def prepare_peft(self, peft: ModuleType) -> None:
        # Compiling its extension takes minutes, and fails with the versions of torch that peftk needs.
        import peft.tuners.boft.layer as module

        module.get_fbd_cuda = lambda: None

    def peft_differs(self, bench: Bench, layer: nn.Module) -> Variant | None:
        found = layer.boft_R["default"].shape[0]
        if found == self.stages:
            return None
        values = {"factors": bench.values["factors"][:found], "scale": bench.values["scale"]}
        remark = f"PEFT runs m={found} without its CUDA extension, whatever the configuration says: less than m=2"
        return Variant(remark, bench.exactly(truth.boft, values))

    def peft_work(self, cell: Cell) -> float:
        # Three products of two square matrices of the input's size forward, and twice as many backward.
        return 2 + 9 * cell.features / cell.tokens

    def lycoris(self, bench: Bench, base: nn.Linear) -> tuple[nn.Module, Values, str, Variant | None]:
        from lycoris.modules.boft import ButterflyOFTModule

        cell = bench.cell
        layer = ButterflyOFTModule("bench", base, 1.0, cell.size, rescaled=True, bypass_mode=True)
        if layer.block_size != cell.size:
            raise ValueError(f"LyCORIS chooses blocks of {layer.block_size} here")
        shape = self.stages, cell.out_features // cell.size, cell.size, cell.size
        generator = torch.Generator(bench.device).manual_seed(3)
        blocks = 0.05 * torch.randn(shape, generator=generator, device=bench.device)
        layer.oft_blocks = nn.Parameter(blocks.to(cell.parameters))
        layer.rescale.data = bench.values["scale"].clone()
        found = {"oft_blocks": layer.oft_blocks, "rescale": layer.rescale}
        remark = (
            "LyCORIS boft, bypass form, given two factors (of its own it takes as many as fit): rotates the OUTPUT, "
            "a different layer of about the same cost"
        )
        return layer, found, remark, Variant(remark, bench.exactly(truth.boft_of_output, found))
