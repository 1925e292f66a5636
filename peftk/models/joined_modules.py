"""Adapters of modules that a model's authors had as one, such as queries, keys and values: joined in that one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint.adapted import MAGNITUDES, Adapted, magnitudes_of_inputs
from ..checkpoint.container import shown
from ..checkpoint.original_names import halves_swapped, original_names, split

__all__ = ["join_originals"]


def join_originals(modules: list[Adapted], weights: Mapping[str, torch.Size]) -> tuple[dict[str, Tensor], list[str]]:
    """Give modules the names of the model's authors, and join in one those that the authors had as one.

    Factors that the parts have in common are kept once. Else the ranks are added up: the first factors stand one below
    the other, and the second ones on a diagonal of blocks, which is exact. A part without an adapter has rows of zeros.
    Outputs that the authors had in another order are brought into it.

    Args:
        modules: The modules, which are changed in place.
        weights: The path of every module of the model to the shape of its weight.

    Returns:
        Which outputs of the new module each module has, in its order, by its name in the source, of those that were
        joined or reordered; and what cannot be.
    """
    names = original_names(weights)
    places = {path.replace(".", "_"): name for name, place in names.items() for path in place.paths}
    groups: dict[tuple[str, str], list[Adapted]] = {}
    found: list[Adapted] = []
    rows: dict[str, Tensor] = {}
    problems = []
    for module in modules:
        name = places.get(module.flat)
        if name is None:
            found.append(module)
        elif len(names[name].paths) > 1:
            groups.setdefault((module.component, name), []).append(module)
        elif names[name].swapped:
            size = weights[names[name].paths[0]][0]
            try:
                parts = split(module.method, module.parts, [size], swapped=True)[0]
            except ValueError as error:
                problems.append(f"module {shown(module.source)}: {error}")
                continue
            found.append(replace(module, path=name, parts=parts))
            rows[module.source] = halves_swapped(torch.arange(size))
        else:
            found.append(replace(module, path=name))
    for (_, name), members in groups.items():
        sizes = {path.replace(".", "_"): weights[path][0] for path in names[name].paths}
        try:
            found.append(_joined(name, members, sizes))
        except ValueError as error:
            problems.append(f"module {shown(members[0].source)}: is a part of {shown(name)}, and {error}")
            continue
        start = 0
        for path, size in sizes.items():
            rows |= {member.source: torch.arange(start, start + size) for member in members if member.flat == path}
            start += size
    modules[:] = found
    return rows, problems


def _joined(name: str, members: list[Adapted], sizes: Mapping[str, int]) -> Adapted:
    """Return one module for several; `sizes` has the outputs of all parts, in their order, by their flat paths."""
    first = members[0]
    if others := {member.method for member in members} - {"LoRA"}:
        raise ValueError(f"{' and '.join(sorted(others))} of several layers is none of one layer")
    if any("lora_mid.weight" in member.parts for member in members):
        raise ValueError("lora_mid.weight has no place there")
    if any(magnitudes_of_inputs(member) for member in members):
        raise ValueError("magnitudes of its inputs are none of those of the whole")
    by_path = {member.flat: member for member in members}
    with_magnitudes = [member for member in members if MAGNITUDES in member.parts]
    if with_magnitudes and len(with_magnitudes) < len(sizes):
        raise ValueError("some of its parts have magnitudes and others have none")
    dtype = functools.reduce(torch.promote_types, (part.dtype for member in members for part in member.parts.values()))
    downs = [member.parts["lora_down.weight"].to(dtype) for member in members]
    notes: list[str] = []
    if all(torch.equal(down, downs[0]) for down in downs) and len({member.alpha for member in members}) == 1:
        rank, alpha, down = downs[0].shape[0], first.alpha, downs[0]
        offsets = dict.fromkeys(by_path, 0)
    else:
        ranks = [down.shape[0] for down in downs]
        rank, alpha = sum(ranks), first.scale * sum(ranks)
        offsets = dict(zip(by_path, itertools.accumulate([0, *ranks]), strict=False))
        down = torch.cat([one.flatten(1) for one in downs])
    scale = first.scale
    blocks = []
    for path, size in sizes.items():
        block = torch.zeros(size, rank, dtype=dtype)
        if path in by_path:
            member = by_path[path]
            up = member.parts["lora_up.weight"].flatten(1)
            if member.scale != scale:
                factor = member.scale / scale
                up = (up.double() * factor).to(dtype)
                notes.append(f"lora_up.weight: that of {member.source} multiplied by {factor:g}: there is one alpha")
            block[:, offsets[path] : offsets[path] + up.shape[1]] = up
        blocks.append(block)
    parts: dict[str, Tensor] = {"lora_down.weight": down, "lora_up.weight": torch.cat(blocks)}
    if with_magnitudes:
        parts[MAGNITUDES] = torch.cat([by_path[path].parts[MAGNITUDES] for path in sizes])
    keys = [member.keys for member in members[1:]]
    return replace(first, path=name, parts=parts, alpha=alpha, notes=[*first.notes, *notes], joined=keys)
