"""What other code reads off an adapted layer, under the names that Hugging Face PEFT's layers have for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn


class Readable(nn.Module):
    """The part of `AdapterLayer` that is read and not run."""

    adapter_layer_names: ClassVar[tuple[str, ...]]
    other_param_names: ClassVar[tuple[str, ...]]
    # Any class of layer, whose attributes differ.
    base_layer: Any
    active_adapters: list[str]
    merged_adapters: list[str]
    disable_adapters: bool
    if TYPE_CHECKING:

        @property
        def adapter_names(self) -> list[str]:
            """The names of all adapters on this layer."""

    @property
    def active_adapter(self) -> list[str]:
        """The active adapters, under PEFT's other name for them."""
        return self.active_adapters

    def _all_available_adapter_names(self) -> list[str]:
        # PEFT's own tests, and libraries on top of it, ask for them.
        return sorted(self.adapter_names)

    def get_base_layer(self) -> nn.Module:
        """Return the wrapped layer."""
        return self.base_layer

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer, if it has one."""
        return getattr(self.base_layer, "bias", None)

    def extra_repr(self) -> str:
        """Name the active and merged adapters and their settings."""
        parts = [f"active_adapters={self.active_adapters}"]
        if self.merged_adapters:
            parts.append(f"merged_adapters={self.merged_adapters}")
        if self.disable_adapters:
            parts.append("disabled")
        for name in self.adapter_names:
            settings = {key: getattr(self, key) for key in self.other_param_names}
            values = ", ".join(f"{key}={values[name]}" for key, values in settings.items() if name in values)
            parts.append(f"{name}=({values})")
        return ", ".join(parts)
