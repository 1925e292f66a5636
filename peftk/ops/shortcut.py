"""What a layer's call on few rows rests on, found once, and asked for again in every call in one step of C++.

Between two tokens nothing of a layer changes. To find that out anew by running Python, with a model's weights going
through the caches in between, takes longer than the arithmetic of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ..runtime import registry, settings
from .plain import OBSERVERS

_COMPILER = vars(torch.compiler)
_FLAG = "_is_compiling_flag"
"""Where torch.compiler notes what `is_compiling` says outside of code that is compiled itself."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_INTERNAL = frozenset(nn.Module().__dict__)
"""The attributes that torch gives to every module."""


class Shortcut:
    """How a layer runs few rows as long as everything that says so is what it was.

    For a tensor of at most `most` numbers ``unchanged(own, calls, empty, entries)`` says whether it is, where `own` is
    the dictionary of the layer. That is not kept here: the layer holds its shortcut, and would be freed late. A copy or
    a pickle of a layer has none.

    Args:
        own: The dictionary of the layer.
    """

    __slots__ = ("_own", "calls", "empty", "entries", "most", "run", "unchanged")

    def __init__(self, own: dict[str, Any]) -> None:
        self._own: dict[str, Any] | None = own
        self.run: Callable[[Tensor], Tensor | None] = lambda x: None
        self.most = 0
        # What one of them says that would run Python is read where it reads it.
        self.calls = tuple(c for c in OBSERVERS if c is not torch.compiler.is_compiling or _FLAG not in _COMPILER)
        hooks = [value for name, value in vars(torch_module).items() if name.startswith("_global_")]
        self.empty: tuple[Any, ...] = (settings.choice.open, *(value for value in hooks if isinstance(value, dict)))
        self.entries: tuple[Any, ...] = ()
        self.unchanged: Callable[..., bool] = lambda *_: False
        self.rest_on(vars(forward_ad), "_current_level")
        self.rest_on(_COMPILER, _FLAG)

    def rest_on(self, where: dict[str, Any], *keys: str) -> None:
        """Note what a dictionary has under these keys, or that it has nothing there."""
        place = None if where is self._own else where
        for key in keys:
            self.entries += (place, key, where.get(key, ...))

    def rest_on_all(self, where: dict[str, Any]) -> None:
        """Note everything that a dictionary has, and that it has nothing else."""
        self.rest_on(where, *where)
        self.entries += (where, None, len(where))

    def rest_on_items(self, items: list[Any]) -> None:
        """Note what a list holds."""
        self.entries += (items, None, tuple(items))

    def rest_on_empty(self, *objects: Any) -> None:
        """Note that these are empty."""
        self.empty += objects

    def rest_on_module(self, module: nn.Module) -> None:
        """Note the parameters of a module whose call the arithmetic replaces, and that nobody observes that call."""
        own = module.__dict__
        self.entries += (module, None, type(module))
        self.rest_on(own, "forward", "weight", "bias", "training", "_parameters")
        self.rest_on(own["_parameters"], *own["_parameters"])
        self.rest_on_empty(*(own[hooks] for hooks in _HOOKS))

    def rest_on_tree(self, module: nn.Module, root: bool = True) -> None:
        """Note all attributes of a module and of those in it, and that nobody observes a call of the latter.

        Numbers in tensors are not noted. Attributes of the module itself that are hooks are its caller's business.
        """
        own = module.__dict__
        if not root:
            self.rest_on_module(module)
        self.rest_on(own, "_modules", "_buffers", "_parameters", "training")
        for content in (own["_modules"], own["_buffers"], own["_parameters"]):
            self.rest_on_all(content)
        for name, value in own.items():
            if name in _INTERNAL:
                continue
            self.rest_on(own, name)
            if type(value) is list:
                self.rest_on_items(value)
            elif type(value) is dict:
                self.rest_on_all(value)
        for child in own["_modules"].values():
            if child is not None:
                self.rest_on_tree(child, root=False)

    def close(self, run: Callable[[Tensor], Tensor | None], most: int) -> bool:
        """Note nothing more, and return whether all of this can be asked and holds.

        Args:
            run: Returns the output for few rows, or None where the layer has to find it in another way.
            most: The numbers of an input beyond which that is always None.
        """
        module = registry.backend_module("native", "unchanged")
        own, self._own = self._own, None
        if isinstance(module, str):
            return False
        self.run, self.most, self.unchanged = run, most, module.unchanged
        return self.unchanged(own, self.calls, self.empty, self.entries)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
