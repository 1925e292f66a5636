"""Weights that are there only while their module is called: offloaded by accelerate, or cast by diffusers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

HOOK_NAMES = ("_hf_hook", "_diffusers_hook", "_old_forward")
"""The attributes in which a module keeps what accelerate and diffusers put on it; no other module has them too."""

TAKE_OFF = "take the hooks off (accelerate.hooks.remove_hook_from_module(model, recurse=True))"
"""The way out, for messages."""


def _hooks(module: nn.Module) -> list[Any]:
    """Return the hooks that bring the parameters of a module before its forward and take them away after, outer first.

    Those of accelerate (`_hf_hook`) and of diffusers (`_diffusers_hook`) replace the `forward` of one module. A hook of
    diffusers that runs anything in place of it is not one of these.
    """
    return _hooks_and_forward(module)[0]


def _hooks_and_forward(module: nn.Module) -> tuple[list[Any], Callable[..., Any] | None]:
    """Return the hooks of a module, and the forward that it had before them; None if that is the one of its class."""
    own = module.__dict__
    if "forward" not in own:
        return [], None
    hooks: list[Any] = []
    inner = []
    if "_hf_hook" in own:
        hooks.append(own["_hf_hook"])
        inner.append(own.get("_old_forward"))
    if "_diffusers_hook" in own:
        registry = own["_diffusers_hook"]
        found = list(registry.hooks.values())
        if any(hasattr(hook, "new_forward") for hook in found):
            return [], None
        hooks += reversed(found)
        inner += [hook.fn_ref.forward for hook in found[:1]]
    if any(getattr(forward, "__func__", None) is type(module).forward for forward in inner):
        return hooks, None
    # Of hooks of both libraries over another forward nobody knows which one was there before.
    return (hooks, inner[0]) if len(inner) == 1 else ([], None)


def hooked(module: nn.Module) -> bool:
    """Whether hooks run before and after each call of a module, and may move what it is given, or its parameters."""
    return bool(_hooks(module))


def comes_and_goes(module: nn.Module) -> bool:
    """Whether the parameters of a module are only there, in the dtype it computes in, while it is called."""
    return any(_takes_away(hook) for hook in _hooks(module))


def _takes_away(hook: Any) -> bool:
    several = getattr(hook, "hooks", None)
    if isinstance(several, (list, tuple)):
        return any(_takes_away(one) for one in several)
    # One of accelerate may only move what the module is given to where its parameters stay.
    return bool(getattr(hook, "offload", not type(hook).__module__.startswith("accelerate."))) or _casts(hook)


def _casts(hook: Any) -> bool:
    return hasattr(hook, "storage_dtype")


def cast_for_calls(module: nn.Module) -> bool:
    """Whether the parameters of a module are stored in one dtype and cast to another while it is called."""
    return any(_casts(one) for hook in _hooks(module) for one in getattr(hook, "hooks", (hook,)))


@contextlib.contextmanager
def _without_forward(module: nn.Module) -> Iterator[None]:
    """Let a module have the forward that it had before its hooks."""
    own = module.__dict__
    _, before = _hooks_and_forward(module)
    forward = own.pop("forward")
    if before is not None:
        own["forward"] = before
    try:
        yield
    finally:
        own["forward"] = forward


def call_onloaded(module: nn.Module, run: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return ``run(*args, **kwargs)``, which may use the parameters of `module` as if nobody had replaced its forward.

    Args:
        module: The module in whose place `run` stands.
        run: Called between the module's hooks, which may move its arguments and its result to other devices.
        args: The arguments of the module.
        kwargs: Its keyword arguments.
    """
    hooks = _hooks(module)
    if not hooks:
        return run(*args, **kwargs)
    entered, output = [], None
    try:
        for hook in hooks:
            entered.append(hook)
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
        # A hook of accelerate may forbid gradients.
        frozen = any(getattr(hook, "no_grad", False) for hook in hooks)
        with _without_forward(module), torch.no_grad() if frozen else contextlib.nullcontext():
            output = run(*args, **kwargs)
    finally:
        for hook in reversed(entered):
            output = hook.post_forward(module, output)
    return output


@contextlib.contextmanager
def onloaded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the parameters of these modules be there during a block."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            hooks = _hooks(module)
            if not hooks:
                continue
            for hook in hooks:
                stack.callback(hook.post_forward, module, None)
                hook.pre_forward(module)
            stack.enter_context(_without_forward(module))
        yield


def copy_onloaded(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module whose parameters stay where and what they are while it is called."""
    parts = list(module.modules())
    # What the hooks hold may be the weights of the whole model.
    kept = [hook for part in parts for hook in map(part.__dict__.get, HOOK_NAMES[:2]) if hook and hooked(part)]
    with onloaded(parts):
        copied = copy.deepcopy(module, {id(hook): hook for hook in kept})
        for part in copied.modules():
            if any(part.__dict__.get(name) is hook for name in HOOK_NAMES for hook in kept):
                for name in HOOK_NAMES:
                    part.__dict__.pop(name, None)
    return copied


def offloaded_values(modules: Iterable[nn.Module]) -> dict[int, Tensor]:
    """Return the values of parameters and buffers on the meta device that accelerate keeps elsewhere, by their id."""
    found = {}
    for module in modules:
        hook = module.__dict__.get("_hf_hook")
        # Several hooks may follow each other.
        for one in getattr(hook, "hooks", (hook,)):
            kept = getattr(one, "weights_map", None)
            if kept is None:
                continue
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_meta and name in kept:
                    found[id(tensor)] = kept[name]
    return found


__all__ = [
    "HOOK_NAMES",
    "TAKE_OFF",
    "call_onloaded",
    "cast_for_calls",
    "comes_and_goes",
    "copy_onloaded",
    "hooked",
    "offloaded_values",
    "onloaded",
]
