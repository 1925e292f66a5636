"""The rotation of OFT: its parameters, its blocks, and what it says of a series that has left its radius."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..methods import oft
from ..methods.oft import orthogonality_error
from ..ops import _seed
from ..ops.kept import Kept

if TYPE_CHECKING:
    from .oft import OFTConfig

SERIES_WARNS, SERIES_REFUSED = 0.1, 1.0
"""The max |R R^T - I| above which a layer warns of its series, and that above which `safe_merge` refuses. A rotation
has 0; at 0.1 features are a few hundredths too long or too short, at 1 some are 40 % too long or shrink to nothing."""
CHECKED_EVERY = 1024
"""The most passes on a CPU between two looks at the series."""


class Told:
    """The occasions on which the layers of one adapter have warned of their series: one warning for all of them."""

    def __init__(self) -> None:
        self.occasions: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Told:
        # The adapter of a copied model, or a new one with a copied configuration, has told nothing yet.
        return Told()


class Rotation(nn.Module):
    """The parameters of one block-diagonal rotation: `weight` (blocks, b (b - 1) / 2), packed skew matrices.

    Args:
        features: Size that is rotated.
        block_size: Size b of a block, a divisor of `features`.
        config: The settings of the method.
        module_name: The path of the layer in its model, for messages.
    """

    def __init__(self, features: int, block_size: int, config: OFTConfig, module_name: str = "") -> None:
        super().__init__()
        self.module_name = module_name
        self._told: Told = config.__dict__.setdefault("_told", Told())
        self._passes = 0
        self.kept = Kept()
        self.block_size = block_size
        self.block_count = features // block_size
        self.block_share = config.block_share
        self.coft = config.coft
        self.eps = config.eps
        self.dropout = float(config.module_dropout)
        self.neumann_terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        stored = 1 if config.block_share else self.block_count
        self.weight = nn.Parameter(torch.zeros(stored, block_size * (block_size - 1) // 2))

    def blocks(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the orthogonal blocks, (blocks, b, b), or (1, b, b) if shared; computed in `dtype` if given."""
        if self.coft:
            with torch.no_grad():
                # Not through autograd's version counter: a layer that is used twice in one pass projects twice, the
                # second time without changing anything.
                self.weight.data.copy_(oft.project(self.weight, self.eps))
        kept = self._draw() if self.training and self.dropout > 0 else None
        arguments = self.weight, self.block_size, self.neumann_terms, kept, dtype
        if kept is None and dtype is None and not torch.is_grad_enabled():
            blocks = self.kept.get(arguments[:1], lambda: oft.rotations(*arguments), arguments[1:3])
        else:
            blocks = oft.rotations(*arguments)
        # A dtype is given where somebody else looks: at merging.
        if dtype is None and self.neumann_terms is not None and not torch.compiler.is_compiling():
            state = self.__dict__  # nn.Module's own __setattr__ takes longer than all of this.
            count = state["_passes"] = state["_passes"] + 1
            if not count & (count - 1) or not count % CHECKED_EVERY:
                self._look(blocks, count)
        return blocks

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x, (..., features); for those who call the module, or listen to its call."""
        return F.block_rotate(x, self.blocks())

    def _draw(self) -> Tensor:
        """Draw which blocks rotate in this pass."""
        _seed.refuse_capture(self.weight.device)
        # Drawn on the CPU's default generator, so that activation checkpointing replays it.
        return torch.rand(self.block_count, device="cpu") >= self.dropout

    def look(self) -> None:
        """Warn if a series has left its radius, where passes that follow are not counted."""
        if self.neumann_terms is not None:
            self._look(self.blocks(), 1)

    def _look(self, blocks: Tensor, count: int) -> None:
        """Warn, now and then, if a series left its radius.

        On a CPU at passes 1, 2, 4, ... and then at every `CHECKED_EVERY`th. Reading a number from another device waits
        for it, so there only the first pass in evaluation mode looks.
        """
        if type(blocks) is not Tensor or "passes" in self._told.occasions:
            return
        where = blocks.device.type
        if (where != "cpu" and (count > 1 or self.training or where == "meta")) or _observed(where):
            return
        error = orthogonality_error(blocks)
        if error > SERIES_WARNS:
            self.tell("passes", error)

    def tell(self, occasion: str, error: float) -> None:
        """Warn that the series is no rotation, once for all layers of the adapter on each occasion."""
        if occasion in self._told.occasions:
            return
        self._told.occasions.add(occasion)
        warnings.warn(
            f"OFT: {self.describe(error)}. Other layers may be as far off. Train a new adapter with "
            "use_cayley_neumann=False, the exact transform (its rotation is the transposed one, so a trained adapter "
            "cannot switch), or take a smaller learning rate",
            stacklevel=3,
        )

    def describe(self, error: float) -> str:
        """Say how far the series is from orthogonal."""
        where = f" of module {self.module_name!r}" if self.module_name else ""
        return (
            f"the Cayley-Neumann series ({self.neumann_terms} terms){where} left its radius and is not orthogonal: "
            f"max |R R^T - I| is {error:.2g}, and that of a rotation 0, so it changes the size of the weights"
        )

    def train(self, mode: bool = True) -> Rotation:
        """Set the mode; the first pass in another one looks at the series."""
        if mode is not self.training:
            self._passes = 0
        return super().train(mode)

    def extra_repr(self) -> str:
        """Name the block size and the options that are on."""
        return (
            f"blocks={self.block_count}, block_size={self.block_size}, block_share={self.block_share}, "
            f"coft={self.coft}, neumann_terms={self.neumann_terms}, dropout={self.dropout}"
        )


def _observed(device: str) -> bool:
    """Whether something records or replaces what runs here, which reading a number would disturb."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined]  # torch imports it and exports it no further.
        or (device == "cuda" and torch.cuda.is_current_stream_capturing())
    )
