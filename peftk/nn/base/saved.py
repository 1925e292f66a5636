"""Modules that are trained and saved in full beside an adapter, such as a new classification head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .freezing import set_trainable
from .offloading import HOOK_NAMES, comes_and_goes


class ModulesToSaveWrapper(nn.Module):
    """A module with one trained copy per adapter; the original stays frozen and is used when no adapter is active.

    Args:
        module: The module to wrap.
    """

    adapter_layer_names = ("modules_to_save",)
    other_param_names = ()

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.disable_adapters = False
        self.train(module.training)

    def attach(self, adapter_name: str, copy: nn.Module) -> None:
        """Add a copy under a new adapter name; it is neither active nor trainable yet."""
        copy.requires_grad_(False)
        self.original_module.requires_grad_(False)
        self.modules_to_save[adapter_name] = copy

    @property
    def _adapters(self) -> set[str]:
        # PEFT's name for those that have a copy.
        return set(self.modules_to_save)

    def current(self) -> nn.Module:
        """Return the module that runs: the active adapter's copy, or the original."""
        if self.disable_adapters or not self.active_adapters:
            return self.original_module
        return self.modules_to_save[self.active_adapters[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the current module.

        Raises:
            RuntimeError: It is trained, and its parameters are offloaded, so that their gradients would be lost.
        """
        current = self.current()
        if self.training and current is not self.original_module and torch.is_grad_enabled():
            for name, module in current.named_modules():
                if comes_and_goes(module) and any(p.requires_grad for p in module.parameters(recurse=False)):
                    raise RuntimeError(
                        f"modules_to_save: the parameters of {name or type(module).__name__} are only there while it "
                        "is called (offloaded, or cast for each call), so that their gradients would be lost; train "
                        "without that, or call eval()"
                    )
        return current(*args, **kwargs)

    def check_set_adapter(self, adapter_names: str | Sequence[str]) -> list[str]:
        """Return which of these names this module has; raise ValueError if there are several."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        found = [name for name in names if name in self.modules_to_save]
        if len(found) > 1:
            raise ValueError(
                f"adapter_names: Only one adapter can be set at a time for ModulesToSaveWrapper, got {found}: each "
                "brings its own copy of a module in modules_to_save"
            )
        return found

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make the one copy among these names that this module has current and (unless `inference_mode`) trainable."""
        self.active_adapters = self.check_set_adapter(adapter_names)
        for name, module in self.modules_to_save.items():
            set_trainable(module, name in self.active_adapters and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze the copies of these adapters."""
        # In a string, "in" would find every name that is a part of it.
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, module in self.modules_to_save.items():
            if name in names:
                module.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between the current copy and the original."""
        self.disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the copy of an adapter, if there is one."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            own = ("original_module", "modules_to_save", *HOOK_NAMES)
            if "_modules" not in self.__dict__ or name in own or name[:2] == "__":
                raise
        return getattr(self.current(), name)
