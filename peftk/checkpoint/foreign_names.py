"""What the names of modules in files of other programs mean in a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from .container import CheckpointError, capped, shown
from .original_names import original_names
from .reader import TensorFile
from .recognise import PREFIXES, Description

__all__ = ["prefix_of", "resolved"]


def resolved(
    found: Description, weights: Mapping[str, torch.Size], file: TensorFile
) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """Map the names of a file to paths of the model; a prefix of which no module is in the model is another model's.

    A module that the model has as several, whose outputs together are its own, has their paths in this order.
    """
    by_prefix: dict[str, dict[str, str | None]] = {}
    for name in found.modules:
        prefix, rest = prefix_of(name)
        by_prefix.setdefault(prefix, {})[name] = rest
    flat: dict[str, list[str]] = {}
    for path in weights:
        flat.setdefault(path.replace(".", "_"), []).append(path)
    original = original_names(weights)
    original |= {name.replace(".", "_"): places for name, places in original.items()}
    paths: dict[str, tuple[str, ...]] = {}
    problems, left_out = [], {}
    for prefix, names in by_prefix.items():
        here: dict[str, tuple[str, ...]] = {}
        lost = []
        for name, rest in names.items():
            fitting = _paths(name, rest or name, weights, flat)
            if len(fitting) > 1:
                problems.append(f"module {shown(name)}: expected one module, and it fits {' and '.join(fitting)}")
            elif fitting:
                here[name] = (fitting[0],)
            elif places := original.get(rest or name):
                here[name] = places
            else:
                lost.append(name)
        if prefix and not here and len(by_prefix) > 1:
            left_out[prefix] = len(lost)
            continue
        problems += [f"module {shown(name)}: the model has no module of this name with a weight" for name in lost]
        paths |= here
    twice = [path for path, count in Counter(p for places in paths.values() for p in places).items() if count > 1]
    problems += [f"module {shown(path)}: has two adapters in the file" for path in twice]
    if not paths and not problems:
        problems.append("no module of the file is in the model")
    if problems:
        raise CheckpointError(file.path, f"has {found}", *capped(problems, "problems"))
    return paths, left_out


def prefix_of(name: str) -> tuple[str, str | None]:
    """Return the prefix of a name and the rest; no prefix and None where none is known."""
    for prefixes in PREFIXES.values():
        for prefix in prefixes:
            if name.startswith(prefix):
                return prefix, name[len(prefix) :]
    return "", None


def _paths(name: str, rest: str, weights: Mapping[str, torch.Size], flat: Mapping[str, list[str]]) -> list[str]:
    """Return the paths that a name may mean: written with dots, or with underscores for them, which loses something."""
    for one in dict.fromkeys((name, rest)):
        if one in weights:
            return [one]
    for one in dict.fromkeys((name, rest)):
        if "." not in one and one in flat:
            return flat[one]
    return []
