"""BOFT."""

# The base class says what the methods are for.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftk.testing.cases import block_diagonal, butterfly, cayley

from ..plain import butterfly as plain
from ._method import Cell, Method, Values, Variant

if TYPE_CHECKING:
    from ..peers import Bench


def exact(x: Tensor, weight: Tensor, bias: Tensor, factors: Tensor, scale: Tensor) -> Tensor:
    """Multiply by the dense butterfly, by the weight, and by the scale of every output."""
    blocks = torch.stack([cayley.transform(stage, stage.shape[-1]) for stage in factors])
    return butterfly.multiply(x, blocks) @ (scale * weight).mT + bias


def _of_output(x: Tensor, weight: Tensor, bias: Tensor, oft_blocks: Tensor, rescale: Tensor) -> Tensor:
    """Multiply by the weight, then by the butterfly, its first factor first, as LyCORIS' boft does."""
    y = x @ weight.mT + bias
    for stage, blocks in enumerate(oft_blocks):
        # Its transform is the transposed one, its factors are multiplied from the other side, and its pairs of
        # half-blocks lie otherwise.
        halves = torch.arange(y.shape[-1], device=x.device).view(-1, 2, 2**stage * blocks.shape[-1] // 2)
        order = halves.mT.flatten()
        turned = block_diagonal.rotate(y[..., order], cayley.transform(blocks - blocks.mT, blocks.shape[-1]))
        y = torch.empty_like(turned).index_copy(-1, order, turned)
    return y * rescale[:, 0]


class Boft(Method):
    """BOFT with two butterfly factors."""

    name, title, letter, config, size = "boft", "BOFT", "b", "BOFTConfig", 4
    targets = 1.15, 1.80, 1.20
    gpu_targets: ClassVar = {4: 1.17}
    gpu_sizes = (4,)
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
        return exact(x, weight, bias, **values)

    def plain(self, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor, **values: Tensor) -> Tensor:
        skew = (values["factors"] - values["factors"].mT).float() / 2
        eye = torch.eye(cell.size, dtype=skew.dtype, device=skew.device)
        blocks = torch.linalg.solve(eye + skew, eye - skew, left=False).to(x.dtype)
        return linear(plain.multiply(x, blocks), weight) * values["scale"][:, 0].to(x.dtype) + bias

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
        return Variant(remark, bench.exactly(exact, values))

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
        return layer, found, remark, Variant(remark, bench.exactly(_of_output, found))


METHODS = (Boft(),)
