"""Weights that stand in several places of a model, and the ties of transformers, which merging may have undone."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, nn

from ..nn.base.offloading import copy_onloaded
from ..nn.base.walking import all_modules
from .names import inner_name, unwrapped
from .targets import places

_TIED = "_tied_weights_keys"


def note_untied(model: nn.Module) -> None:
    """Turn off those ties of a transformers model that no longer hold, and no others.

    Whoever ties it again, or loads what is saved of it, would lose one of the two weights. The one switch that a
    configuration has turns off every tie, and what transformers has left out of the file as a duplicate would come back
    random. It is used where no tie is left; otherwise the ties that broke are taken out of the model's own list. When
    such a file is loaded, transformers finds both weights in it and leaves them apart.
    """
    model = unwrapped(model)
    # All models of one configuration have one switch: the names of broken ties, and what is left of every model's list.
    by_config: dict[int, tuple[Any, list[str], list[tuple[nn.Module, dict[str, str]]]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        config = getattr(module, "config", None)
        if not getattr(config, "tie_word_embeddings", False):
            continue
        _, broken, kept = by_config.setdefault(id(config), (config, [], []))
        ties = _ties(module)
        left = {target: source for target, source in ties.items() if _one(module, target, source)}
        kept.append((module, left))
        broken += [f"{prefix}.{target}" if prefix else target for target in ties if target not in left]
    for config, broken, kept in by_config.values():
        if not broken:
            continue
        count = sum(len(left) for _, left in kept)
        if not count:
            config.tie_word_embeddings = False
            said = "tie_word_embeddings is set to False in the configuration of the model"
        else:
            _keep_only(model, kept, broken)
            said = f"the model keeps its {count} other ties"
        warnings.warn(
            f"merge_and_unload: {', '.join(broken)}: the input and output embeddings are no longer tied; {said}",
            stacklevel=5,
        )


def tie_copies(modules: Mapping[str, nn.Module], saved: dict[str, nn.Module], adapted: Container[str]) -> bool:
    """Let the copies of modules that share a weight share one too, and copy those of them that were not named.

    Args:
        modules: The modules of a model by path.
        saved: The copies that an adapter trains in full; others are added.
        adapted: The paths of the modules that the adapter adapts.

    Returns:
        Whether any share one.

    Raises:
        NotImplementedError: Modules that share a weight are adapted.
    """
    sharing: dict[int, dict[str, nn.Module]] = {}
    for path, module in modules.items():
        own = getattr(module, "original_module", getattr(module, "base_layer", module))
        weight = own._parameters.get("weight")
        if weight is not None:
            sharing.setdefault(id(weight), {})[path] = own
    found = False
    for group in sharing.values():
        if len(group) == 1:
            continue
        if any(path in adapted for path in group):
            raise NotImplementedError(
                f"ensure_weight_tying=True: {[*group]} have one weight, and one of them is adapted; it is implemented "
                "for modules_to_save and trainable_token_indices"
            )
        if not any(path in saved for path in group):
            continue
        source = next((path for path, module in group.items() if isinstance(module, nn.Embedding)), next(iter(group)))
        saved.update({path: copy_onloaded(module) for path, module in group.items() if path not in saved})
        for path in group:
            saved[path].weight = saved[source].weight
        found = True
    return found


def _ties(module: nn.Module) -> dict[str, str]:
    """Return the names of the parameters that a transformers model ties, each with what it is tied to."""
    expand = getattr(type(module), "get_expanded_tied_weights_keys", None)
    if callable(expand):
        return expand(module, all_submodels=False)
    # Older releases of transformers tie the embeddings by this switch, and everything else without asking it.
    found = []
    for getter in ("get_output_embeddings", "get_input_embeddings"):
        method = getattr(module, getter, None)
        layer = method() if callable(method) else None
        found += [f"{name}.weight" for name, part in module.named_modules() if part is layer and layer is not None][:1]
    return dict([found]) if len(found) == 2 else {}


def holders(model: nn.Module) -> Counter[int]:
    """Count in how many places of a model every parameter stands, by its id."""
    modules = [module for module in all_modules(model) if inner_name(module) is None]
    held = Counter(
        id(unwrapped(child)) for module in modules for child in module._modules.values() if child is not None
    )
    found: Counter[int] = Counter()
    for module in modules:
        for parameter in module._parameters.values():
            found[id(parameter)] += held[id(module)]
    return found


def sharing(model: nn.Module, parameter: Tensor) -> list[str]:
    """Return the names under which a parameter stands in a model."""
    held = places(model)
    return [
        f"{path}.{key}"
        for _, module in model.named_modules()
        for key, other in module._parameters.items()
        if other is parameter
        for path in held.get(id(module), ())
    ]


def _one(module: nn.Module, first: str, second: str) -> bool:
    """Whether two names are those of one tensor; a name that does not exist breaks no tie."""
    tensors = []
    for name in (first, second):
        owner, _, last = name.rpartition(".")
        try:
            tensors.append(getattr(module.get_submodule(owner), last))
        except AttributeError:
            return True
    a, b = tensors
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return True
    return a is b or (a.data_ptr() == b.data_ptr() and not a.is_meta)


def _keep_only(model: nn.Module, kept: list[tuple[nn.Module, dict[str, str]]], broken: list[str]) -> None:
    for module, left in kept:
        if getattr(module, _TIED, None):
            setattr(module, _TIED, left)
    known = getattr(model, "all_tied_weights_keys", None)
    if isinstance(known, dict):
        for name in broken:
            known.pop(name, None)


__all__ = ["holders", "note_untied", "sharing", "tie_copies"]
