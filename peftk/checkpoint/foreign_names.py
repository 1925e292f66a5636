"""What the names of modules in files of other programs mean in a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from .adapted import outputs
from .container import CheckpointError, capped, shown
from .original_names import Place, original_names
from .reader import TensorFile
from .recognise import PREFIXES, Description

__all__ = ["prefix_of", "resolved", "spellings"]

_CLIP = "text_model"
"""What the modules of transformers' CLIPTextModel were under in earlier releases, and in published files still are."""


def resolved(
    found: Description, weights: Mapping[str, torch.Size], file: TensorFile
) -> tuple[dict[str, Place], dict[str, int]]:
    """Map the names of a file to paths of the model; a prefix of which no module is in the model is another model's.

    A module that the model has as several, whose outputs together are its own, has their paths in this order. Where
    modules of two prefixes have the same names, as those of two text encoders, the one whose tensors fit is meant.
    """
    by_prefix: dict[str, dict[str, str | None]] = {}
    for name in found.modules:
        prefix, rest = prefix_of(name)
        by_prefix.setdefault(prefix, {})[name] = rest
    flat: dict[str, list[str]] = {}
    for path in weights:
        flat.setdefault(path.replace(".", "_"), []).append(path)
    original = original_names(weights)
    original |= {name.replace(".", "_"): place for name, place in original.items()}
    by_place: dict[str, dict[str, Place]] = {}
    missing: dict[str, list[str]] = {}
    problems, left_out = [], {}
    for prefix, names in by_prefix.items():
        here: dict[str, Place] = {}
        lost = missing[prefix] = []
        for name, rest in names.items():
            fitting = _paths(name, rest or name, weights, flat)
            if len(fitting) > 1:
                problems.append(f"module {shown(name)}: expected one module, and it fits {' and '.join(fitting)}")
            elif fitting:
                here[name] = Place((fitting[0],))
            elif place := original.get(rest or name):
                here[name] = place
            else:
                lost.append(name)
        if prefix and not here and len(by_prefix) > 1:
            left_out[prefix] = len(lost)
            continue
        by_place[prefix] = here
    for prefix in _others(by_place, missing, found, weights):
        left_out[prefix] = len(by_place.pop(prefix)) + len(missing[prefix])
    problems += [
        f"module {shown(name)}: the model has no module of this name with a weight"
        for prefix in by_place
        for name in missing[prefix]
    ]
    paths = {name: place for here in by_place.values() for name, place in here.items()}
    counted = Counter(path for place in paths.values() for path in place.paths)
    twice = [path for path, count in counted.items() if count > 1]
    problems += [f"module {shown(path)}: has two adapters in the file" for path in twice]
    if len(by_place) > 1:
        problems.append(
            f"{' and '.join(map(shown, by_place))}: modules of several models in this one; write the one "
            "that is wanted as a folder: python -m peftk convert FILE FOLDER --to peft --component NAME"
        )
    if not paths and not problems:
        problems.append("no module of the file is in the model")
    if problems:
        raise CheckpointError(file.path, f"has {found}", *capped(problems, "problems"))
    return paths, {prefix: left_out[prefix] for prefix in by_prefix if prefix in left_out}


def prefix_of(name: str) -> tuple[str, str | None]:
    """Return the prefix of a name and the rest; no prefix and None where none is known."""
    for prefixes in PREFIXES.values():
        for prefix in prefixes:
            if name.startswith(prefix):
                return prefix, name[len(prefix) :]
    return "", None


def spellings(name: str) -> tuple[str, ...]:
    """Return the names that a module may have in a model, the likeliest one first."""
    for dot in "._":
        if name.startswith(_CLIP + dot):
            return name, name[len(_CLIP + dot) :]
    return name, f"{_CLIP}{'.' if '.' in name else '_'}{name}"


def _others(
    by_place: Mapping[str, Mapping[str, Place]],
    missing: Mapping[str, list[str]],
    found: Description,
    weights: Mapping[str, torch.Size],
) -> list[str]:
    """Return the prefixes of other models: some modules have names of this one's, but all do not fit into it."""
    if len(by_place) < 2:
        return []

    def fits(prefix: str) -> bool:
        return not missing[prefix] and all(
            outputs(found.modules[name]) == sum(weights[path][0] for path in place.paths)
            for name, place in by_place[prefix].items()
        )

    others = [prefix for prefix in by_place if not fits(prefix)]
    return others if len(others) < len(by_place) else []


def _paths(name: str, rest: str, weights: Mapping[str, torch.Size], flat: Mapping[str, list[str]]) -> list[str]:
    """Return the paths that a name may mean: written with dots, or with underscores for them, which loses something."""
    names = dict.fromkeys((name, *spellings(rest)))
    for one in names:
        if one in weights:
            return [one]
    for one in names:
        if "." not in one and one in flat:
            return flat[one]
    return []
