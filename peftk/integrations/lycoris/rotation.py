"""LyCORIS's diag-OFT and BOFT: the outputs of linear layers and convolutions are rotated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...methods import output_rotation
from ...methods.output_rotation import Turn
from .network_module import SHARED, Call, NetworkModuleWay, base_output, example_weight


class Rotated(NetworkModuleWay):
    """Modules that rotate the output of their layer."""

    parameter_names = ("oft_blocks", "rescale")

    rescales_last = True
    """Whether bypass_mode scales what it has rotated, whatever the multiplier."""

    def changes_weight(self, layer: Any) -> bool:
        """See `NetworkModuleWay.changes_weight`."""
        return not layer.bypass_mode

    def unfit(self, layer: Any, x: Tensor | None) -> str | None:
        """See `NetworkModuleWay.unfit`."""
        if layer.bypass_mode and layer.module_type != "linear":
            return "bypass_mode on a convolution"
        if layer.bypass_mode and layer.rescaled and layer.multiplier != 1 and not self.rescales_last:
            return "bypass_mode adds the rescaled output to the rotated one unless the multiplier is 1"
        return super().unfit(layer, x)

    def adapter(self, layer: Any) -> Turn:
        """See `NetworkModuleWay.adapter`."""
        blocks = output_rotation.rotations(layer.oft_blocks, float(layer.constraint))
        blocks = output_rotation.weakened(blocks, float(layer.multiplier))
        if blocks.dim() == 4:
            blocks = output_rotation.interleaved(blocks)
        return Turn(blocks, layer.rescale if layer.rescaled else None)

    def adapted(self, layer: Any, x: Tensor, call: Call) -> Tensor:
        """See `NetworkModuleWay.adapted`."""
        base, turn, _ = call
        if layer.module_type != "linear":
            return output_rotation.conv(base, x, [turn])
        if layer.bypass_mode:
            # There the bias is rotated too.
            return output_rotation.rotated(base_output(layer, x), turn)
        return output_rotation.linear(base, x, [turn])

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        plain, blocks = example_weight(layer), adapters[0].adapter.blocks
        if plain is None or blocks.dim() != 3:
            return None
        x, weight, _ = plain
        return x.new_empty(len(x), len(weight)), blocks.detach()


_OFT = "lycoris.modules.diag_oft.DiagOFTModule"
_BOFT = "lycoris.modules.boft.ButterflyOFTModule"


class DiagOFT(Rotated):
    """Modules with one block-diagonal rotation."""

    method = "diag-oft"
    rescales_last = False
    layers = (_OFT,)
    operator = "block_rotate"
    copied = (
        *SHARED,
        f"{_OFT}.get_r",
        f"{_OFT}.make_weight",
        f"{_OFT}.bypass_forward",
        f"{_OFT}._bypass_forward",
        "lycoris.functional.diag_oft.get_r",
        "lycoris.functional.diag_oft.diff_weight",
        "lycoris.functional.diag_oft._diff_weight",
        "lycoris.functional.diag_oft._bypass_diff",
    )


class BOFT(Rotated):
    """Modules with a butterfly of rotations."""

    method = "boft"
    layers = (_BOFT,)
    operator = "block_rotate"
    copied = (
        *SHARED,
        f"{_BOFT}.make_weight",
        f"{_BOFT}.bypass_forward",
        f"{_BOFT}._bypass_forward",
        "lycoris.functional.diag_oft.get_r",
        "lycoris.functional.boft.diff_weight",
        "lycoris.functional.boft._diff_weight",
        "lycoris.functional.boft._bypass_diff",
    )
