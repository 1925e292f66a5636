"""`update_layer`, by which scripts make an adapter on one layer, or make it anew with other settings."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from .config import PeftConfig
from .undo import all_or_nothing

_PATTERNS = ("rank_pattern", "alpha_pattern", "block_size_pattern")


class Updatable(nn.Module):
    """The part of `AdapterLayer` that makes an adapter of the layer anew.

    Attributes:
        update_fields: What `update_layer` takes beside the configuration, in PEFT's order: its name there to the field.
    """

    update_fields: ClassVar[dict[str, str]] = {}
    # What an adapter has been made anew with: the configuration of its model does not know it.
    updated: dict[str, PeftConfig]
    if TYPE_CHECKING:
        module_name: str
        base_layer: Any
        active_adapters: list[str]
        merged_adapters: list[str]
        adapter_layer_names: ClassVar[tuple[str, ...]]

        @property
        def adapter_names(self) -> list[str]:
            """The names of all adapters on this layer."""

        def __getattr__(self, name: str) -> Any: ...

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Make an adapter on this layer, in the place of one of that name if there is one; on failure nothing changes.

        The settings of a model's other layers, and its configuration, stay as they are. An adapter that has other
        settings than that says is not saved.

        Args:
            adapter_name: The adapter.
            *args: What `update_fields` names (for LoRA `r` and `lora_alpha`), and then `config`; by position or by
                name, as in PEFT.
            **kwargs: `config`, the configuration for everything else; `target_name`, the path of the layer.

        Raises:
            TypeError: `config` or another argument is missing, or unknown.
            ValueError: The adapter is merged, or the settings do not fit the layer.
        """
        names = (*self.update_fields, "config")
        if len(args) > len(names):
            raise TypeError(
                f"update_layer: expected {len(names)} arguments after adapter_name at most, got {len(args)}"
            )
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        path = values.pop("target_name", "") or self.module_name
        for name in names:
            if name not in values:
                raise TypeError(f"{name}: update_layer expects {', '.join(names)} after adapter_name")
        unknown = sorted(values.keys() - {*names})
        if unknown:
            raise TypeError(
                f"{unknown[0]}: update_layer expects {', '.join(names)} after adapter_name, and target_name"
            )
        config = values.pop("config")
        if not isinstance(config, PeftConfig):
            raise TypeError(f"config: expected the configuration of an adapter, got {type(config).__name__}")
        # What is said here holds for this layer, whatever patterns say.
        plain: dict[str, Any] = {name: {} for name in _PATTERNS if values and hasattr(config, name)}
        config = dataclasses.replace(config, **plain, **{self.update_fields[name]: v for name, v in values.items()})
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter_name: {adapter_name!r} is merged; unmerge it before updating it")
        self.check_add(config)
        adapter = self.make(self.base_layer, config, path)
        active = list(self.active_adapters)
        containers = [getattr(self, name) for name in self.adapter_layer_names]
        with all_or_nothing([self, *containers]):
            if adapter_name in self.adapter_names:
                self.delete_adapter(adapter_name)
            self.attach(adapter_name, adapter)
            self.updated[adapter_name] = config
            self.set_adapter(active, inference_mode=config.inference_mode)


__all__ = ["Updatable"]
