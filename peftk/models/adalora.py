"""What only AdaLoRA asks of a model: ranks that are allocated while it trains, and files without what was pruned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..nn import AdaLoraConfig, AdapterLayer, PeftConfig
from ..nn.adalora.linear import AdaLoRALinear
from ..nn.adalora.rank_allocator import RankAllocator, orthogonality_loss
from ..nn.base.config import check_int
from ..nn.base.undo import all_or_nothing
from .described import Described


class Allocating(Described):
    """The part of `Tuner` that allocates ranks; without a trainable AdaLoRA adapter it does nothing."""

    peft_config: dict[str, PeftConfig]
    if TYPE_CHECKING:

        def _layers(self) -> Iterator[tuple[str, AdapterLayer]]: ...

    def _start_allocating(self) -> None:
        self._allocators: dict[str, RankAllocator] = {}

    def _forget_allocator(self, name: str) -> None:
        self._allocators.pop(name, None)

    def _check_one_trained(self, config: PeftConfig) -> None:
        """Raise ValueError if a second adapter of this kind would be trained."""
        trained = self._trained_adalora()
        if trained and isinstance(config, AdaLoraConfig) and not config.inference_mode:
            raise ValueError(
                f"inference_mode: AdaLoraModel supports only 1 trainable adapter, and {trained[0]!r} is one already; "
                "set inference_mode=True for the others"
            )

    def _trained_adalora(self) -> list[str]:
        return [n for n, c in self.peft_config.items() if isinstance(c, AdaLoraConfig) and not c.inference_mode]

    @property
    def rankallocator(self) -> RankAllocator:
        """What chooses the ranks of the trainable AdaLoRA adapter.

        Raises:
            AttributeError: There is none; any other exception would break `hasattr` and whatever walks over a module.
        """
        if not self._trained_adalora():
            raise AttributeError("adapter: no adapter of this model is a trainable AdaLoRA adapter")
        return self._allocator()

    def _allocator(self) -> RankAllocator:
        names = self._trained_adalora()
        if not names:
            raise ValueError("adapter: no adapter of this model is a trainable AdaLoRA adapter")
        if names[0] not in self._allocators:
            config = self.peft_config[names[0]]
            assert isinstance(config, AdaLoraConfig)
            layers = ((path, layer) for path, layer in self._layers() if isinstance(layer, AdaLoRALinear))
            self._allocators[names[0]] = RankAllocator(layers, names[0], config)
        return self._allocators[names[0]]

    def update_and_allocate(self, global_step: int) -> None:
        """Prune the trainable AdaLoRA adapter; see `PeftModel.update_and_allocate`."""
        check_int("global_step", global_step, 0, 2**63)
        allocator = self._allocator()
        # What it masks is small; its averages are as good a step earlier or later.
        pattern = allocator.config.rank_pattern
        try:
            with all_or_nothing([], [], allocator.masked()):
                allocator.update_and_allocate(global_step)
        except BaseException:
            allocator.config.rank_pattern = pattern
            raise

    def orthogonality_loss(self) -> Tensor:
        """Return the term that keeps A and B of AdaLoRA orthogonal; see `PeftModel.orthogonality_loss`."""
        allocator = self._allocator()
        return allocator.config.orth_reg_weight * orthogonality_loss(allocator.layers, allocator.adapter_name)

    def _with_regulariser(self, outputs: Any) -> Any:
        """Return what a model returns, with AdaLoRA's regulariser in its loss where PEFT adds it too."""
        loss = getattr(outputs, "loss", None)
        if isinstance(loss, Tensor) and (names := self._trained_adalora()):
            config = self.peft_config[names[0]]
            if config.task_type is not None and config.orth_reg_in_loss and config.orth_reg_weight:
                outputs.loss = loss + self.orthogonality_loss()
        return outputs

    def _take_pattern(self, name: str, config: PeftConfig) -> None:
        """Let an adapter that got the values of a file know which triplets that has pruned, and forget its averages."""
        ours = self.peft_config.get(name)
        if isinstance(ours, AdaLoraConfig) and isinstance(config, AdaLoraConfig) and ours is not config:
            ours.rank_pattern = copy.deepcopy(config.rank_pattern)
            self._forget_allocator(name)


__all__ = ["Allocating"]
