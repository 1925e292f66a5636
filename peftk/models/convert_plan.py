"""What an adapter file of one program becomes as that of another: every key of it, and why something cannot be said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import foreign, foreign_numbers
from ..checkpoint.adapted import (
    COMPONENTS,
    MAGNITUDES,
    OTHER_MAGNITUDES,
    OUTPUT,
    Adapted,
    as_lycoris,
    component_of,
    magnitudes_of_inputs,
    weight_shape,
)
from ..checkpoint.container import CheckpointError, capped, shown
from ..checkpoint.foreign_names import prefix_of, spellings
from ..checkpoint.original_names import halves_swapped, original_names, split
from ..checkpoint.reader import TensorFile
from ..checkpoint.recognise import DIALECTS, PREFIXES
from ..nn import PeftConfig
from ..nn.base.config import LayerInFile
from . import provenance
from .adapter_source import PROVENANCE, Source
from .joined_modules import join_originals

__all__ = ["DIALECTS", "Plan", "plan_for"]

WRITTEN = {"kohya": ("LoRA",), "diffusers": ("LoRA", "LoKr")}
"""The methods of dialects that have not all of them."""

_PEFT = "base_model.model."
_PREFIX = "diffusion_model."


@dataclass
class Plan:
    """What a conversion will write.

    Attributes:
        dialect: A key of `DIALECTS`.
        rows: Every key of the source, what it becomes or an empty string, and what to know of it.
        tensors: What will be written.
        metadata: The strings of its header.
        config: The configuration, of PEFT.
        exact: Whether it restores the file that the source was made from.
        outputs: The name of a module in the source to which outputs of the written one are its own, in its order, where
            it has become a part of another one or has them in another order.
    """

    dialect: str
    rows: list[tuple[str, str, str]]
    tensors: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    config: dict[str, Any] | None = field(default=None, repr=False)
    exact: bool = False
    outputs: dict[str, Tensor] = field(default_factory=dict, repr=False)


def plan_for(
    source: Source,
    dialect: str,
    *,
    weights: Mapping[str, torch.Size] | None = None,
    component: str | None = None,
    drop: Iterable[str] = (),
    original: bool = False,
) -> Plan:
    """Say what an adapter becomes in another dialect; nothing is written.

    Args:
        source: The adapter.
        dialect: A key of `DIALECTS`.
        weights: The path of every module of the model to the shape of its weight. It is asked for where names with
            underscores have to become paths with dots, and where shapes alone do not tell what a layer is.
        component: A key of `COMPONENTS`: what the modules belong to where the file does not say; for PEFT, which holds
            one model in a folder, the one that is taken.
        original: Whether modules get the names of the authors of SDXL, Flux, SD3 and Wan where they have others, for
            kohya, LyCORIS and ComfyUI; those that have become several are joined. It needs `weights`.
        drop: Patterns, such as ``"*.classifier.*"``, of keys that are left out on purpose.

    Raises:
        ValueError: `dialect` or `component` is none of them, or `original` is for a dialect with names of diffusers,
            without `weights`, or for those of a model with no other names.
        CheckpointError: Something of the adapter cannot be said in that dialect; every reason is named.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"dialect: expected one of {', '.join(DIALECTS)}, got {shown(dialect)}")
    if component is not None and component not in COMPONENTS:
        raise ValueError(f"component: expected one of {', '.join(COMPONENTS)}, got {shown(component)}")
    if original and (dialect in ("peft", "diffusers") or weights is None):
        raise ValueError(
            "original: names of the authors are those of kohya, LyCORIS and ComfyUI, and --model tells them; got "
            f"{DIALECTS[dialect]}{' without it' if weights is None else ''}"
        )
    if original and not original_names(weights or ()):
        raise ValueError("original: expected diffusers' model of SDXL, Flux, SD3 or Wan")
    origin = source.origin
    patterns = list(drop)
    as_it_was = origin is not None and origin.get("dialect") == DIALECTS[dialect] and origin.get("exact")
    if origin is not None and as_it_was and not patterns and not original:
        tensors, rows, metadata, config = provenance.restored(source, origin)
        return Plan(dialect, rows, tensors, metadata, config, exact=True)
    rows = []
    modules, problems = _wanted(source, dialect, component, patterns, rows)
    lost = [key for key in source.others if not _matches(key, patterns)]
    rows += [(key, "", "left out, as asked for") for key in source.others if key not in lost]
    problems += [
        f"key {shown(key)}: of no adapter, and {DIALECTS[dialect]} has no place for it; leave it out with --drop"
        for key in lost
    ]
    if not problems and not modules:
        problems.append("nothing is left to be written")
    outputs: dict[str, Tensor] = {}
    if not problems and weights is not None and dialect in ("peft", "diffusers"):
        outputs, more = _split(modules, weights)
        problems += more
    if not problems and original and weights is not None:
        outputs, more = join_originals(modules, weights)
        problems += more
    if not problems and dialect == "lycoris":
        problems += _as_lycoris(modules)
    if not problems:
        problems += _settle_names(modules, source, dialect, weights, origin)
    if not problems and weights is not None:
        problems += [text for module in modules if (text := _misfit(module, weights.get(module.path)))]
    if not problems and source.dialect == "PEFT" and dialect not in ("peft", "diffusers"):
        problems += _settle_magnitudes(modules, weights)
    if problems:
        raise CheckpointError(source.path, f"cannot be written as {DIALECTS[dialect]}", *capped(problems, "problems"))
    if dialect in ("peft", "diffusers"):
        plan = _as_peft(source, modules, dialect, weights, rows)
    else:
        plan = _as_others(modules, dialect, rows)
    plan.outputs = outputs
    plan.metadata[PROVENANCE] = provenance.of(source, plan.rows, plan.tensors)
    return plan


def _any(keys: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(key, pattern) for key in keys)


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _wanted(
    source: Source, dialect: str, component: str | None, patterns: list[str], rows: list[tuple[str, str, str]]
) -> tuple[list[Adapted], list[str]]:
    """Choose the modules that are written, and say why the others are not."""
    modules: list[Adapted] = []
    problems = [f"--drop {shown(one)}: no key is like that" for one in patterns if not _any(source.file, one)]
    for module in source.modules:
        matched = [_matches(key, patterns) for key in (*module.keys.values(), *module.unused)]
        if any(matched) and not all(matched):
            problems.append(f"module {shown(module.source)}: --drop has some of its keys, and needs all or none")
        elif all(matched):
            rows += [(key, "", "left out, as asked for") for key in (*module.keys.values(), *module.unused)]
        elif dialect == "peft" and component is not None and module.component not in ("", component):
            why = f"of {module.component}, and {component} was asked for"
            rows += [(key, "", why) for key in (*module.keys.values(), *module.unused)]
        else:
            rows += [(key, "", why) for key, why in module.unused.items()]
            modules.append(replace(module))
    if dialect in WRITTEN:
        problems += [
            f"module {shown(module.source)}: {module.method} is not written by {DIALECTS[dialect]}; "
            "write it as lycoris, which more programs read"
            for module in modules
            if module.method not in WRITTEN[dialect]
        ]
    if dialect == "diffusers":
        problems += [
            f"module {shown(module.source)}: diffusers has no magnitudes for {module.method}"
            for module in modules
            if module.method != "LoRA" and MAGNITUDES in module.parts
        ]
        problems += [
            f"module {shown(module.source)}: diffusers has no magnitudes of inputs; write the file as lycoris"
            for module in modules
            if magnitudes_of_inputs(module)
        ]
        methods = {module.method for module in modules}
        if len(methods) > 1:
            problems.append(f"methods: diffusers has one in a file, got {' and '.join(sorted(methods))}")
    parts = Counter(module.component for module in modules)
    if dialect == "peft" and len(parts) > 1:
        named = ", ".join(f"{name or 'none'} ({count} modules)" for name, count in parts.items())
        problems.append(
            f"component: a folder of PEFT holds one model, and the file has {named}; choose with --component"
        )
    if dialect != "peft":
        usual = "" if dialect == "lycoris" else "unet"
        for module in modules:
            module.component = module.component or component or usual
    if dialect == "comfyui":
        problems += [
            f"module {shown(module.source)}: ComfyUI bounds rotations by another constraint; write the file as lycoris"
            for module in modules
            if module.method == OUTPUT
        ]
        problems += [
            f"module {shown(module.source)}: ComfyUI reads text encoders with kohya's names; write the file as kohya"
            for module in modules
            if COMPONENTS[module.component].comfyui is None
        ]
    return modules, problems


def _split(modules: list[Adapted], weights: Mapping[str, torch.Size]) -> tuple[dict[str, Tensor], list[str]]:
    """Put modules in the place of one that the model has as several, or with its outputs in another order."""
    outputs: dict[str, Tensor] = {}
    known = {path.replace(".", "_") for path in weights}
    originals = {name.replace(".", "_"): place for name, place in original_names(weights).items()}
    found, problems = [], []
    for module in modules:
        place = originals.get(module.flat)
        if module.flat in known or place is None:
            found.append(module)
            continue
        try:
            pieces = split(module.method, module.parts, [weights[path][0] for path in place.paths], place.swapped)
        except ValueError as error:
            problems.append(f"module {shown(module.source)}: {error}")
            continue
        found += [replace(module, path=path, parts=parts) for path, parts in zip(place.paths, pieces, strict=True)]
        if place.swapped:
            outputs[module.source] = halves_swapped(torch.arange(weights[place.paths[0]][0]))
    modules[:] = found
    return outputs, problems


def _as_lycoris(modules: list[Adapted]) -> list[str]:
    """Give rotations the blocks that LyCORIS makes of as many outputs."""
    problems = []
    for module in modules:
        try:
            module.parts = as_lycoris(module)
        except ValueError as error:
            problems.append(f"module {shown(module.source)}: {error}")
    return problems


def _settle_names(
    modules: list[Adapted],
    source: Source,
    dialect: str,
    weights: Mapping[str, torch.Size] | None,
    origin: Mapping[str, Any] | None,
) -> list[str]:
    """Turn underscores back into dots where the dialect writes dots, and find names that would collide."""
    problems = []
    if dialect in ("kohya", "lycoris"):
        counted = Counter((_first_words(module, modules), module.flat) for module in modules)
        for (prefix, name), count in counted.items():
            if count > 1:
                problems.append(f"name {shown(prefix + name)}: {count} modules would have it; dots become underscores")
        return problems
    if source.dialect not in ("kohya", "LyCORIS"):
        return []
    flat: dict[str, set[str]] = {}
    originals = original_names(weights or ()) if dialect == "comfyui" else {}
    for path in [*(weights or {}), *originals, *((origin or {}).get("paths") or [])]:
        flat.setdefault(path.replace(".", "_"), set()).add(path)
    for module in modules:
        found = next((flat[name] for name in spellings(module.flat) if name in flat), set())
        if len(found) == 1:
            module.path = next(iter(found))
        elif found:
            problems.append(f"module {shown(module.source)}: fits {' and '.join(sorted(found))}")
        elif weights is None:
            problems.append(f"module {shown(module.source)}: is written with underscores for dots; pass --model")
        else:
            problems.append(f"module {shown(module.source)}: the model has no module of this name")
    return problems


def _misfit(module: Adapted, weight: torch.Size | None) -> str | None:
    """Say how the tensors of a module do not fit the weight of the model, or return None."""
    if weight is None:
        return None
    found = weight_shape(module)
    for shape in (weight, torch.Size(weight[::-1])) if len(weight) == 2 else (weight,):
        # Those of transformers' Conv1D lie the other way round. A rotation tells its outputs alone, and the factors of
        # some methods have flattened filters.
        flat = module.method in ("LoHa", "LoKr")
        same = found.numel() == shape.numel() if flat else _trimmed(found) == _trimmed(shape)
        if found[0] == shape[0] and (same or module.method == OUTPUT):
            return None
    return f"module {shown(module.source)}: is for a weight {tuple(found)}, and the model has one of {tuple(weight)}"


def _trimmed(shape: torch.Size) -> tuple[int, ...]:
    """Return a shape without the sizes of one at its end, which a linear layer has as a 1 x 1 convolution."""
    return tuple(shape[: max(2, max((axis + 1 for axis, size in enumerate(shape) if size != 1), default=0))])


def _settle_magnitudes(modules: list[Adapted], weights: Mapping[str, torch.Size] | None) -> list[str]:
    """Give magnitudes the dimensions of the weight, which factors of flattened filters do not tell."""
    problems = []
    for module in modules:
        scale = module.parts.get(MAGNITUDES)
        if scale is None or len(weight_shape(module)) > 2 or module.method == "LoRA":
            continue
        shape = (weights or {}).get(module.path)
        if shape is None:
            problems.append(
                f"module {shown(module.source)}: its magnitudes have the dimensions of the weight, which "
                f"{module.method} does not tell; pass --model"
            )
        else:
            module.parts = module.parts | {MAGNITUDES: scale.reshape(*scale.shape[:2], *[1] * (len(shape) - 2))}
    return problems


def _first_words(module: Adapted, modules: Iterable[Adapted]) -> str:
    """Return what the name of a module begins with in kohya's and LyCORIS' files."""
    if not module.component:
        return "lycoris_"
    own, _ = prefix_of(module.source)
    if own in PREFIXES["kohya"] and component_of(own) == module.component:
        return own
    if module.component == "text_encoder" and all(_has_one_encoder(one) for one in modules):
        return "lora_te_"
    return COMPONENTS[module.component].kohya


def _has_one_encoder(module: Adapted) -> bool:
    """Whether a module may be of a pipeline with one text encoder, as SD 1.5 has: no transformer, no UNet of SDXL."""
    if module.component in ("text_encoder_2", "text_encoder_3", "transformer"):
        return False
    return module.component != "unet" or "_transformer_blocks_1_" not in f"_{module.flat}_"


def _as_others(modules: list[Adapted], dialect: str, rows: list[tuple[str, str, str]]) -> Plan:
    tensors: dict[str, Tensor] = {}
    renamed = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"} if dialect == "comfyui" else {}
    for module in modules:
        if dialect == "comfyui":
            name = f"{COMPONENTS[module.component].comfyui}{module.path}"
        else:
            name = _first_words(module, modules) + module.flat
        for part, tensor in module.parts.items():
            key = f"{name}.{renamed.get(part, part)}"
            tensors[key] = tensor
            note = next((n for n in module.notes if n.startswith(f"{part}:")), "")
            # The first factor of a whole weight is in no file.
            if part in module.keys:
                rows.append((module.keys[part], key, note))
            rows += [(keys[part], key, "joined with others") for keys in module.joined if part in keys]
        # Whole factors have no scale, but LyCORIS does not load a module without this number.
        tensors[f"{name}.alpha"] = torch.tensor(1.0 if module.alpha is None else module.alpha)
        rows += [(keys["alpha"], f"{name}.alpha", "") for keys in (module.keys, *module.joined) if "alpha" in keys]
    return Plan(dialect, rows, tensors, {"format": "pt"})


def _as_peft(
    source: Source,
    modules: list[Adapted],
    dialect: str,
    weights: Mapping[str, torch.Size] | None,
    rows: list[tuple[str, str, str]],
) -> Plan:
    tensors: dict[str, Tensor] = {}
    configs: dict[str, dict[str, Any]] = {}
    for component in dict.fromkeys(module.component for module in modules):
        some = [module for module in modules if module.component == component]
        prefix = COMPONENTS[component].diffusers if dialect == "diffusers" else _PEFT
        found, config = _one_model(source, some, weights)
        configs[component] = config
        tensors |= {prefix + key: tensor for key, tensor in found.items()}
        for module in some:
            _note(module, prefix, found, rows)
    if dialect == "peft":
        return Plan(dialect, rows, tensors, {"format": "pt"}, next(iter(configs.values())))
    told = {
        f"{component}.{name}": value
        for component, config in configs.items()
        for name, value in config.items()
        if name != "peft_type"
    }
    metadata = {"format": "pt", foreign_numbers.METADATA: json.dumps(told, sort_keys=True)}
    return Plan(dialect, rows, tensors, metadata)


def _one_model(
    source: Source, modules: list[Adapted], weights: Mapping[str, torch.Size] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors by PEFT's keys without a prefix, and the configuration."""
    # One prefix for all: some paths begin as the names of other dialects do.
    written = {f"{_PREFIX}{m.path}.{part}": tensor for m in modules for part, tensor in m.parts.items()}
    written |= {f"{_PREFIX}{m.path}.alpha": torch.tensor(m.alpha) for m in modules if m.alpha is not None}
    shapes = {m.path: (weights or {}).get(m.path, weight_shape(m)) for m in modules}
    try:
        converted = foreign.as_peft(TensorFile(source.path, written, {}, False), shapes)
        layers = {path: LayerInFile(tuple(shapes[path]), parts) for path, parts in converted.layers.items()}
        kind = PeftConfig._by_type[converted.config["peft_type"]]
        config = converted.config | kind.fields_of(layers)
    except CheckpointError as error:
        raise CheckpointError(source.path, *(text.replace(_PREFIX, "") for text in error.problems[1:])) from None
    except ValueError as error:
        raise CheckpointError(source.path, f"{error}; pass --model, which says what the layers are") from None
    return {key.removeprefix(_PEFT): tensor for key, tensor in converted.tensors.items()}, config


def _note(module: Adapted, prefix: str, found: Mapping[str, Tensor], rows: list[tuple[str, str, str]]) -> None:
    """Say what became of the tensors of a module."""
    ends = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    ends |= {"oft_blocks": "output_oft_blocks", "rescale": "output_oft_scale"}
    for part, key in module.keys.items():
        if part == "alpha":
            rows.append(
                (key, "", "in the configuration" if module.alpha is not None else "whole factors have no scale")
            )
            continue
        end = ends.get(part, part)
        if part == MAGNITUDES:
            end = next(name for name in OTHER_MAGNITUDES if f"{module.path}.{name}" in found)
        target = f"{module.path}.{end}"
        note = next((n for n in module.notes if n.startswith(f"{part}:")), "")
        if part == MAGNITUDES and module.method != "LoRA":
            note = (
                f"read by peftk alone: PEFT has no magnitudes for {module.method}, and leaves them out with a warning"
            )
        if part == "lora_mid.weight":
            rows.append((key, "", "multiplied into lora_A.weight"))
        else:
            rows.append((key, prefix + target, note))
