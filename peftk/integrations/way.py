"""How the layers of one class of another library run on this package's arithmetic."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..methods._base_layer import Few, plain_tensors, unobserved
from ..ops._few_rows import few
from ..ops.shortcut import Shortcut
from .fingerprints import Fingerprints

Forward = Callable[..., Any]
"""The `forward` of a class of layers."""

SHORTCUTS: weakref.WeakKeyDictionary[Any, Shortcut] = weakref.WeakKeyDictionary()
"""How layers run few rows, found at their first call of that kind; nothing of it is in the layer itself."""


class Way:
    """One class of layers of another library, run by `peftk.methods`; a subclass is a class of layers.

    An instance holds no layer. It decides for each call, before anything of the layer has run, and what it does not
    take runs in the library's own code as if this package were not there.

    Args:
        fingerprints: The sources of the library's functions that are known.
        correct: Compute this package's values where those of the library are wrong.
        force: Go on where the source of a function is not known.
    """

    method: ClassVar[str]
    """What the method is called in the library, such as "lora"."""

    layers: ClassVar[tuple[str, ...]]
    """The classes, as dotted names; only a layer of exactly one of these is taken."""

    operator: ClassVar[str]
    """The operator of `peftk.functional`, or the function of torch, that does most of the work."""

    copied: ClassVar[tuple[str, ...]] = ()
    """Functions of the library, as dotted names, whose meaning is repeated here, beside the `forward` of the class."""

    copied_by_some: ClassVar[tuple[str, ...]] = ()
    """The same for a part of the layers alone, which the others do not need to be known."""

    def __init__(self, fingerprints: Fingerprints, *, correct: bool = False, force: bool = False) -> None:
        self.fingerprints, self.correct, self.force = fingerprints, correct, force

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), self.correct, self.force))

    def unknown(self, names: Sequence[str]) -> str | None:
        """Name the first of these functions whose source is not known, and the version of the library, or None."""
        return None if self.force else self.fingerprints.unknown(names)

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """Return the tensors and settings of the active adapters, or why the library's own code runs.

        Args:
            layer: The layer.
            x: Its input; None to look at the layer alone.
        """
        raise NotImplementedError

    def usual(self, layer: Any, x: Any) -> bool:
        """Whether a call is an ordinary one: adapters act on a plain tensor that nothing transforms or traces."""
        return plain(x)

    def run(self, layer: Any, x: Tensor, adapters: list[Any]) -> Tensor:
        """Return the output of a layer with what `adapters` has returned."""
        raise NotImplementedError

    def note(self, layer: Any) -> str | None:
        """Return what a user should know of a layer that is accelerated, such as what differs, or None."""
        return None

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """Return arguments of `operator` as a call of the layer gives, of which no values are read; None if unknown."""
        return None

    def few(self, layer: Any, adapters: list[Any], weight: Tensor, bias: Tensor | None, rests: Shortcut) -> Few | None:
        """Return how a layer runs few rows as long as nothing of it changes, or None if as it runs many.

        Args:
            layer: The layer; what is returned holds no reference to it.
            adapters: What `adapters` has returned.
            weight: That of the base layer, a plain dense nn.Linear, (out, in).
            bias: Its bias, (out,), or None.
            rests: Takes note of what that rests on beside all attributes of the layer.
        """
        return None

    def _find_shortcut(self, layer: Any, x: Tensor, adapters: list[Any]) -> None:
        """Remember how a layer runs few rows like x, if it does that in a way of its own."""
        base = layer._modules.get("base_layer")
        if type(base) is not nn.Linear or len(adapters) != 1 or layer.training or base.training:
            return
        if not few(x, base.in_features) or not unobserved() or (plain := plain_tensors(base, x)) is None:
            return
        found = Shortcut(layer.__dict__)
        short = self.few(layer, adapters, *plain, found)
        if short is not None:
            found.rest_on_tree(layer)
            if found.close(short.run, short.rows * base.in_features):
                SHORTCUTS[layer] = found

    def around(self, original: Forward, here: Callable[[Any], bool]) -> Forward:
        """Return a `forward` that runs what this way takes, and in the original everything else.

        Args:
            original: The `forward` of the library's class.
            here: Says whether a layer is accelerated still.
        """
        usual, adapters, run = self.usual, self.adapters, self.run
        # What a dictionary of weak keys holds them in: its own look-up runs more Python.
        known: Any = SHORTCUTS.data  # type: ignore[attr-defined]  # An attribute that its description leaves out.
        ref = weakref.ref

        def forward(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            # All is decided before the base layer is called: afterwards the library would call it again.
            if args or kwargs or not here(layer):
                return original(layer, x, *args, **kwargs)
            eager = not torch.compiler.is_dynamo_compiling()
            shortcut = known.get(ref(layer)) if eager else None
            if shortcut is not None and type(x) is Tensor and x.numel() <= shortcut.most:
                if not shortcut.unchanged(layer.__dict__, shortcut.calls, shortcut.empty, shortcut.entries):
                    SHORTCUTS.pop(layer, None)
                    shortcut = None
                elif (y := shortcut.run(x)) is not None:
                    return y
            if usual(layer, x):
                found = adapters(layer, x)
                if type(found) is list:
                    if eager and shortcut is None and not torch.is_grad_enabled():
                        self._find_shortcut(layer, x, found)
                    return run(layer, x, found)
            return original(layer, x)

        return forward


def plain(x: Any) -> bool:
    """Whether a tensor is one that the arithmetic takes, and nothing transforms or traces the call."""
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and x.layout is torch.strided
        and x.numel() > 0
        and not _has_any_global_hook()
        and not torch._C._are_functorch_transforms_active()
        and (torch.compiler.is_compiling() or not torch._C._is_tracing())
        and torch.autograd.forward_ad._current_level < 0
    )


def bare(layer: Any, kind: type[nn.Module]) -> Any:
    """Return a layer of a plain class of torch with the parameters of another, whose hooks are not its own.

    It is for the time of one call of that layer, which has called its hooks already.
    """
    made: Any = kind.__new__(kind)
    state = made.__dict__
    state.update(layer.__dict__)
    state.pop("forward", None)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        state[hooks] = {}
    return made


def forward_of(cls: Any) -> Forward:
    """Return the function that a class has as its `forward`, without what this package has put around it."""
    function = cls.forward
    return getattr(function, "_peftk_original", function)
