"""Names of modules without the parts that wrappers add to them: activation checkpointing, FSDP, torch.compile, DDP."""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch import nn

# The child in which a wrapper keeps what it wraps. These names say by themselves what they are.
_INNER = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
# `module` may be anybody's name; it is that of these wrappers only.
_PARALLEL = ("DataParallel", "DistributedDataParallel", "DeepSpeedEngine")


def inner_name(module: nn.Module) -> str | None:
    """Return the name under which a wrapper holds what it wraps, or None if the module is no wrapper."""
    children = module._modules
    if not children:
        return None
    if len(children) == 1:
        (name,) = children
        if name in _INNER:
            return name
    if "module" in children and any(c.__name__ in _PARALLEL for c in type(module).__mro__):
        return "module"
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what is inside of all wrappers of a module, or the module itself."""
    while (name := inner_name(module)) is not None:
        module = module.get_submodule(name)
    return module


def without_wrappers(key: str) -> str:
    """Return a name without the parts that can only be those of wrappers."""
    if not any(name in key for name in _INNER):
        return key
    return ".".join(part for part in key.split(".") if part not in _INNER)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `model.named_modules()` does, every wrapped module in place of its wrappers and under their name."""
    seen: set[nn.Module] = set()
    # A stack and not a recursion: one generator inside the other would cost every name the depth of its module.
    stack = [("", unwrapped(model))]
    while stack:
        path, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        stack += named_children(path, module)


def named_children(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children of a module by their full names, the last one first, without wrappers."""
    prefix = f"{path}." if path else ""
    return [
        # Most modules hold nothing, and so wrap nothing.
        (prefix + name, unwrapped(child) if child._modules else child)
        for name, child in reversed(module._modules.items())
        if child is not None
    ]


def is_inside(path: str, holders: Container[str]) -> bool:
    """Return whether one of the modules `holders` holds `path`, at any depth."""
    return any(path[:i] in holders for i, letter in enumerate(path) if letter == ".")


def place_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that holds `path`, a name of `named_modules`, and the child's name there.

    If that child is wrapped, it is the innermost wrapper that holds it.

    Raises:
        AttributeError: There is no such module.
    """
    holder = unwrapped(model)
    *parents, name = path.split(".")
    for parent in parents:
        holder = unwrapped(holder.get_submodule(parent))
    child = holder.get_submodule(name)
    while (inner := inner_name(child)) is not None:
        holder, name, child = child, inner, child.get_submodule(inner)
    return holder, name


def clean_state(module: nn.Module, key: str) -> str:
    """Return a key of the state dict of `module` without the parts that wrappers in it add."""
    parts = key.split(".")
    kept = []
    current: nn.Module | None = module
    for part in parts:
        # Some wrappers take their own part out of a state dict, others leave it.
        while current is not None and (inner := inner_name(current)) is not None and part != inner:
            current = current._modules[inner]
        if current is not None and inner_name(current) == part:
            current = current._modules[part]
            continue
        kept.append(part)
        current = current._modules.get(part) if current is not None else None
    return ".".join(kept)


__all__ = [
    "clean_state",
    "inner_name",
    "is_inside",
    "named_children",
    "named_modules",
    "place_of",
    "unwrapped",
    "without_wrappers",
]
