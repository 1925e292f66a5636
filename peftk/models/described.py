"""What scripts written for Hugging Face PEFT read off the object that holds the adapters of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..nn import AdapterLayer, PeftConfig


class Described(nn.Module):
    """The part of `Tuner` that answers such questions."""

    uses_shared_state = False
    prefix: str = ""
    """What the names of the parameters of the first adapter's method begin with."""

    if TYPE_CHECKING:
        peft_config: dict[str, PeftConfig]
        active_adapters: list[str]

        @property
        def model(self) -> nn.Module:
            """The base model."""

        def _layers(self) -> Iterator[tuple[str, AdapterLayer]]: ...

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the adapted layers."""
        return [path for path, _ in self._layers()]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter acts: it is active, and adapters are not switched off."""
        return bool(self.active_adapters) and any(not layer.disable_adapters for _, layer in self._layers())

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of the modules that any adapter trains in full, or None."""
        names = {name for c in self.peft_config.values() for name in getattr(c, "modules_to_save", None) or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The dtype of the base model, if it says one."""
        found = getattr(self.model, "dtype", None)
        return found if isinstance(found, torch.dtype) else None


__all__ = ["Described"]
