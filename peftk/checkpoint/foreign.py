"""Adapter files of kohya's scripts, LyCORIS, diffusers and ComfyUI as PEFT would have written them.

Nothing is guessed and nothing is left out: a file is turned into a configuration and tensors with PEFT's names, which
mean the same update of every module, or it is refused with all reasons. The scale of a module is alpha / rank, as its
writers have it; a module without an alpha has a scale of 1. LoKr whose two factors are both whole has a scale of 1
whatever its alpha. What LyCORIS rotates is the output of a layer, which is a method of its own here, for PEFT rotates
the input; its alpha is a constraint.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapted import DOWN, OTHER_MAGNITUDES, OUTPUT, TYPES, UP, WHOLE
from .container import CheckpointError, capped, shown
from .foreign_names import resolved
from .foreign_numbers import alpha_of, constraint_of, is_number, scale_of_whole, written_alphas
from .original_names import split
from .reader import TensorFile
from .recognise import Found, recognise

__all__ = ["Converted", "as_peft"]

_KEY = "base_model.model."


@dataclass
class Converted:
    """An adapter in PEFT's words.

    Attributes:
        config: The content of adapter_config.json.
        tensors: Key to tensor, as in adapter_model.safetensors.
        layers: The path of each layer to the shapes of its tensors, by the ends of their keys.
        left_out: How many modules belong to another model, by the prefix of their names.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    layers: dict[str, dict[str, torch.Size]]
    left_out: dict[str, int]


@dataclass
class _Module:
    """What one module of a file is in PEFT's words; the scale is alpha / rank.

    Attributes:
        path: Where it is in the model.
        rank: The rank.
        alpha: Numerator of the scale.
        used: Which tensors of the file say so.
        tensors: Those of PEFT, by the end of their names.
        flags: Fields of the configuration that it needs.
        dora: Whether it has magnitudes.
        factors: How many butterfly factors a rotation has, whose block size is the rank and whose constraint alpha.
    """

    path: str
    rank: int
    alpha: float
    used: tuple[str, ...]
    tensors: dict[str, Tensor]
    flags: dict[str, bool] = field(default_factory=dict)
    dora: bool = False
    factors: int = 0


def as_peft(file: TensorFile, weights: Mapping[str, torch.Size]) -> Converted:
    """Turn a file into PEFT's configuration and tensors.

    Args:
        file: The file.
        weights: Path of every module of the model that has a weight, to its shape.

    Raises:
        CheckpointError: It cannot be turned without changing what it means; every reason is named.
    """
    found = recognise({key: tensor.shape for key, tensor in file.tensors.items()}, file.metadata)
    problems = found.problems()
    if found.dialect in (None, "PEFT"):
        problems.append(
            "expected a file of kohya's scripts, LyCORIS, diffusers or ComfyUI; one with the names of PEFT needs the "
            "adapter_config.json beside it, which has its alpha: pass the folder"
        )
    problems += [
        f"key {shown(key)}: dtype expected floating, got {tensor.dtype}"
        for key, tensor in file.tensors.items()
        if not is_number(key, tensor.dtype)
    ]
    foreign = [method for method in found.methods if method not in _READERS]
    if foreign:
        problems.append(f"methods: expected {', '.join(_READERS)}; got {', '.join(foreign)}, which peftk cannot load")
    elif len(found.methods) > 1:
        problems.append(f"methods: expected one in the file, got {', '.join(found.methods)}")
    if problems:
        raise CheckpointError(file.path, f"has {found}", *capped(problems, "problems"))
    paths, left_out = resolved(found, weights, file)
    alphas = written_alphas(file.metadata, file)
    modules = []
    for name, place in paths.items():
        one = found.modules[name]
        try:
            whole = {part: file.tensors[f"{name}.{part}"] for part in one.parts}
            pieces = split(one.method or "", whole, [weights[path][0] for path in place.paths], place.swapped)
            for path, parts in zip(place.paths, pieces, strict=True):
                modules.append(_module(name, path, one, parts, weights[path], alphas))
        except ValueError as error:
            problems.append(f"module {shown(name)}: {error}")
    if len({module.dora for module in modules}) > 1:
        problems.append("dora_scale: expected on all modules or on none")
    if len({module.flags.get("dora_inputs") for module in modules if module.dora}) > 1:
        problems.append("dora_scale: expected numbers of outputs on all modules, or of inputs on all of them")
    if len({module.flags.get("use_rescale") for module in modules}) > 1:
        problems.append("rescale: expected on all modules or on none")
    if found.methods[0] == OUTPUT and len(bounds := {module.alpha for module in modules}) > 1:
        problems.append(f"alpha: expected one constraint for all modules, got {', '.join(map(str, sorted(bounds)))}")
    if problems:
        raise CheckpointError(file.path, f"has {found}", *capped(problems, "problems"))
    tensors = {f"{_KEY}{module.path}.{key}": value for module in modules for key, value in module.tensors.items()}
    layers = {module.path: {key: value.shape for key, value in module.tensors.items()} for module in modules}
    return Converted(_config(found.methods[0], modules), tensors, layers, left_out)


# -- modules ----------------------------------------------------------------------------------------------------------


def _module(
    name: str, path: str, found: Found, parts: Mapping[str, Tensor], weight: torch.Size, written: Mapping[str, Any]
) -> _Module:
    for part, tensor in parts.items():
        if tensor.dim() < 2 and part not in (
            "alpha",
            "lora_alpha",
            "dora_scale",
            "rescale",
            "diff_b",
            "w_norm",
            "b_norm",
            *OTHER_MAGNITUDES,
        ):
            raise ValueError(f"{part}: expected two dimensions or more, got shape {tuple(tensor.shape)}")
    reader = _READERS[found.method or ""]
    made = reader.read(name, path, parts, weight, written)
    magnitudes = [part for part in ("dora_scale", *OTHER_MAGNITUDES) if part in parts]
    left = parts.keys() - {"alpha", "lora_alpha", *magnitudes, *made.used}
    if left:
        raise ValueError(f"{', '.join(sorted(left))}: peftk cannot load it")
    if len(magnitudes) > 1:
        raise ValueError(f"{' and '.join(magnitudes)}: expected one of them")
    for part in magnitudes:
        if reader.magnitudes is None:
            raise ValueError(f"{part}: expected none beside {', '.join(made.used)}")
        _add_magnitudes(made, part, parts[part], weight, reader.magnitudes)
    return made


def _add_magnitudes(made: _Module, part: str, scale: Tensor, weight: torch.Size, container: str) -> None:
    # A square weight has as many inputs as outputs: there the axis decides, which PEFT's names leave open.
    first = 0 if part == "dora_scale" else next((i for i, size in enumerate(scale.shape) if size > 1), 0)
    of_outputs = scale.dim() > 0 and scale.shape[first] == scale.numel() == weight[0]
    of_inputs = part == "dora_scale" and scale.dim() > 1 and scale.shape[1] == scale.numel() == weight[1]
    if not (of_outputs or of_inputs):
        raise ValueError(
            f"{part}: expected one number for each of the {weight[0]} outputs, (out, 1, ...), or of the {weight[1]} "
            f"inputs, (1, in, ...), got shape {tuple(scale.shape)}"
        )
    places = [1] * (len(weight) - 2)
    # LoRA's are a module with the shape of a convolution's output.
    as_output = places and container == _READERS["LoRA"].magnitudes
    if not of_outputs:
        made.tensors[container] = scale.reshape(1, -1)
        made.flags["dora_inputs"] = True
    else:
        made.tensors[container] = scale.reshape(1, -1, *places) if as_output else scale.reshape(-1)
    made.dora = True


def _first(parts: Mapping[str, Tensor], names: tuple[str, ...]) -> tuple[str, Tensor]:
    for name in names:
        if name in parts:
            return name, parts[name]
    raise ValueError(f"{', '.join(sorted(parts))}: peftk cannot load it; expected {names[0]}")


def _fitted(factor: Tensor, dims: int) -> Tensor:
    """Return a factor with the dimensions of the weight: linear layers are written as 1 x 1 convolutions, and back."""
    if factor.dim() > dims and all(size == 1 for size in factor.shape[dims:]):
        return factor.flatten(dims - 1)
    return factor.reshape(*factor.shape, *[1] * (dims - factor.dim())) if factor.dim() < dims else factor


def _lora(name: str, path: str, parts: Mapping[str, Tensor], weight: torch.Size, written: Mapping[str, Any]) -> _Module:
    (down_name, down), (up_name, up) = _first(parts, DOWN), _first(parts, UP)
    used: tuple[str, ...] = (down_name, up_name)
    if "lora_mid.weight" in parts:
        used, down = (*used, "lora_mid.weight"), _with_core(down, parts["lora_mid.weight"])
    a, b = _fitted(down, len(weight)), _fitted(up, len(weight))
    rank = a.shape[0]
    if b.dim() < 2 or b.shape[1] != rank:
        raise ValueError(f"{up_name}: expected the rank {rank} of {down_name}, got shape {tuple(up.shape)}")
    tensors = {"lora_A.weight": a, "lora_B.weight": b}
    return _Module(path, rank, alpha_of(name, rank, parts, written), used, tensors)


def _with_core(down: Tensor, core: Tensor) -> Tensor:
    """Return the first factor of a convolution that stands for a 1 x 1 convolution and the core behind it."""
    if core.dim() < 3 or down.dim() < 2 or core.shape[1] != down.shape[0] or down[0, 0].numel() != 1:
        raise ValueError(
            f"lora_mid.weight: expected a core (rank, rank, kernel) behind a factor (rank, in, 1, ...), got shapes "
            f"{tuple(core.shape)} and {tuple(down.shape)}"
        )
    return torch.einsum("ab...,bi->ai...", core.double(), down.flatten(1).double()).to(down.dtype)


def _loha(name: str, path: str, parts: Mapping[str, Tensor], weight: torch.Size, written: Mapping[str, Any]) -> _Module:
    four = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    cores = tuple(core for core in ("hada_t1", "hada_t2") if core in parts)
    ranks = {parts[part].shape[0] for part in ("hada_w1_b", "hada_w2_b") if parts[part].dim() == 2}
    if len(ranks) != 1 or len(cores) == 1:
        raise ValueError(f"expected matrices of one rank and both cores or none, got {sorted(parts)}")
    (rank,) = ranks
    flags = {}
    if len(weight) > 2 and any(size > 1 for size in weight[2:]):
        flags["use_effective_conv2d"] = bool(cores)
    tensors = {part: parts[part] for part in (*four, *cores)}
    if len(weight) == 3:
        # PEFT's cores of an nn.Conv1d have a last dimension of one.
        tensors |= {core: tensors[core].unsqueeze(-1) for core in cores if tensors[core].dim() == 3}
    return _Module(path, rank, alpha_of(name, rank, parts, written), (*four, *cores), tensors, flags)


def _lokr(name: str, path: str, parts: Mapping[str, Tensor], weight: torch.Size, written: Mapping[str, Any]) -> _Module:
    used = tuple(part for part in parts if part.startswith("lokr_"))
    if "lokr_t1" in used:
        raise ValueError("lokr_t1: peftk cannot load it")
    ranks = {parts[part].shape[0] for part in ("lokr_w1_b", "lokr_w2_b") if part in parts}
    if len(ranks) > 1:
        raise ValueError(f"expected factors of one rank, got {sorted(ranks)}")
    flags = {}
    tensors = {part: parts[part] for part in used}
    if "lokr_w1" not in parts:
        flags["decompose_both"] = True
    if len(weight) > 2 and any(size > 1 for size in weight[2:]) and "lokr_w2" not in parts:
        flags["use_effective_conv2d"] = "lokr_t2" in parts
    if len(weight) == 3:
        # Beside a first factor of one number there is nothing that could be in another order.
        if "lokr_w2" in parts and parts.get("lokr_w1", parts["lokr_w2"]).numel() > 1:
            raise ValueError("lokr_w2: a whole factor on an nn.Conv1d has another order of its numbers in PEFT")
        if "lokr_t2" in tensors and tensors["lokr_t2"].dim() == 3:
            tensors["lokr_t2"] = tensors["lokr_t2"].unsqueeze(-1)
    elif len(weight) == 2 and "lokr_w2" in parts:
        tensors["lokr_w2"] = _fitted(parts["lokr_w2"], 2)
    if not ranks:
        # Whole factors: any rank from half of their size on, and an alpha that makes the scale 1.
        rank = max(weight[0], weight[1])
        return _Module(path, rank, rank * scale_of_whole(name, written), used, tensors, flags)
    (rank,) = ranks
    return _Module(path, rank, alpha_of(name, rank, parts, written), used, tensors, flags)


def as_kronecker(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the change of a whole weight as the tensors of LoKr.

    Raises:
        ValueError: It changes something else: a bias, or a layer that norms.
    """
    if "diff" not in parts:
        raise ValueError(f"{', '.join(sorted(parts))}: the change of a norm layer, which no adapter here makes")
    if "diff_b" in parts and bool(parts["diff_b"].count_nonzero()):
        raise ValueError("diff_b: the change of a bias, which no adapter here makes")
    return {"lokr_w1": parts["diff"].new_ones(1, 1), "lokr_w2": parts["diff"]}


def _whole(
    name: str, path: str, parts: Mapping[str, Tensor], weight: torch.Size, written: Mapping[str, Any]
) -> _Module:
    factors = as_kronecker(parts)
    factors["lokr_w2"] = _fitted(factors["lokr_w2"], len(weight))
    made = _lokr(name, path, factors, weight, written)
    made.used = ("diff", "diff_b")
    return made


def _rotation(
    name: str, path: str, parts: Mapping[str, Tensor], weight: torch.Size, written: Mapping[str, Any]
) -> _Module:
    blocks, scale = parts["oft_blocks"], parts.get("rescale")
    out, size = weight[0], blocks.shape[-1]
    odd = blocks.dim() == 4 and size % 2
    if blocks.dim() not in (3, 4) or blocks.shape[-2] != size or blocks.shape[-3] * size != out or odd:
        raise ValueError(
            f"oft_blocks: expected (blocks, b, b) or (m, blocks, b, b) with blocks * b = {out}, the outputs of the "
            f"layer, got shape {tuple(blocks.shape)}"
        )
    factors = blocks.shape[0] if blocks.dim() == 4 else 0
    tensors = {"output_oft_blocks": blocks}
    if scale is not None and (scale.numel() != out or max(scale.shape, default=1) != out):
        raise ValueError(f"rescale: expected {out} numbers, one for each output, got shape {tuple(scale.shape)}")
    if scale is not None:
        tensors["output_oft_scale"] = scale.reshape(-1, *[1] * (len(weight) - 1))
    flags = {"use_rescale": scale is not None}
    return _Module(path, size, constraint_of(parts), ("oft_blocks", "rescale"), tensors, flags, factors=factors)


class _Reader(NamedTuple):
    """How the tensors of a method are read, and what its magnitudes are called in PEFT's format, if it has any."""

    read: Callable[[str, str, Mapping[str, Tensor], torch.Size, Mapping[str, Any]], _Module]
    magnitudes: str | None


_READERS = {
    "LoRA": _Reader(_lora, "lora_magnitude_vector"),
    "LoHa": _Reader(_loha, "hada_magnitude_vector"),
    "LoKr": _Reader(_lokr, "lokr_magnitude_vector"),
    OUTPUT: _Reader(_rotation, None),
    WHOLE: _Reader(_whole, None),
}


# -- the configuration ------------------------------------------------------------------------------------------------


def _config(method: str, modules: list[_Module]) -> dict[str, Any]:
    if method == OUTPUT:
        return _rotation_config(modules)
    alpha = "lora_alpha" if method == "LoRA" else "alpha"
    rank = Counter(module.rank for module in modules).most_common(1)[0][0]
    usual = Counter(module.alpha for module in modules).most_common(1)[0][0]
    flags: dict[str, bool] = {}
    for module in modules:
        for name, value in module.flags.items():
            flags[name] = flags.get(name, False) or value
    return {
        "peft_type": TYPES[method],
        "r": rank,
        alpha: _number(usual),
        "rank_pattern": {_exactly(m.path): m.rank for m in modules if m.rank != rank},
        "alpha_pattern": {_exactly(m.path): _number(m.alpha) for m in modules if m.alpha != usual},
        "target_modules": [module.path for module in modules],
        **({"use_dora": True} if modules[0].dora else {}),
        **flags,
    }


def _rotation_config(modules: list[_Module]) -> dict[str, Any]:
    sizes, counts = {m.path: m.rank for m in modules}, {m.path: m.factors for m in modules}
    size, factors = (Counter(found.values()).most_common(1)[0][0] for found in (sizes, counts))
    return {
        "peft_type": TYPES[OUTPUT],
        "block_size": size,
        "butterfly_factors": factors,
        "block_size_pattern": {_exactly(path): value for path, value in sizes.items() if value != size},
        "factors_pattern": {_exactly(path): value for path, value in counts.items() if value != factors},
        "constraint": modules[0].alpha,
        "use_rescale": modules[0].flags["use_rescale"],
        "target_modules": list(sizes),
    }


def _exactly(path: str) -> str:
    return f"^{re.escape(path)}"


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
