"""Adapters merged into the files of a model, one tensor after the other, without the model in memory.

The layers are the ones that run, and compute what `merge_and_unload` computes, bit by bit; only the weight of the one
that is being merged is there.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.container import CheckpointError, capped, shown
from ..checkpoint.peft import WEIGHTS_NAME
from ..checkpoint.reader import header_shapes
from ..checkpoint.writer import write_in_turn
from ..nn import PeftConfig
from ..nn.base.adapter_layer import AdapterLayer
from ..nn.base.kinds import HALF
from ..nn.base.merging import check_finite
from ..nn.base.saved import ModulesToSaveWrapper
from ..nn.lora.start import starts_inside
from ..ops.plain import DENSE
from .base_files import CONFIG, Base, empty_model
from .peft_model import PeftModel

__all__ = ["Merge", "merge_files"]

OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
"""Files that hold weights, or say where they are: they are not copied beside the merged ones."""


@dataclass
class Merge:
    """What was done.

    Attributes:
        tensors: How many tensors the model has.
        lost: The path of a merged layer to the part of its update that rounding took, 0 to about 1.
        replaced: Keys that `modules_to_save` has replaced.
        files: The names of the files that were written or copied.
    """

    tensors: int
    lost: dict[str, float]
    replaced: list[str]
    files: list[str]


def merge_files(
    base: Base,
    adapters: Sequence[tuple[str, float]],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    safe_merge: bool = True,
    force: bool = False,
    progressbar: bool = False,
) -> Merge:
    """Write a model with adapters merged into it; all of it or nothing.

    Args:
        base: The model.
        adapters: Path of each adapter, a folder of PEFT or the file of another program, and what its scale is
            multiplied by.
        out: The new folder. Configuration, tokenizer and what else is beside the weights is copied.
        dtype: Of the floating tensors that are written; None for those of the base.
        safe_merge: Whether to refuse weights that are not finite, and rotations that are far from orthogonal.
        force: Whether to replace a folder that is there.
        progressbar: Whether to show one.

    Raises:
        ValueError: `out` is there already, or is the base.
        CheckpointError: An adapter does not fit the model, cannot be merged, or needs a tensor that the files do not
            have under the name that the model has.
    """
    # What a link leads to is replaced, and not the link.
    target = Path(os.path.realpath(out))
    if os.path.lexists(target):
        for read in (base.folder, *(Path(path) for path, _ in adapters)):
            if read.resolve().is_relative_to(target.resolve()):
                raise ValueError(f"out: expected another folder than those that are read, got {str(target)!r}")
        if not force:
            raise ValueError(f"out: {str(target)!r} is there already; choose another name, or --force to replace it")
        if not (target / CONFIG).is_file():
            raise ValueError(f"out: {str(target)!r} has no {CONFIG}, so it is no model to replace; choose another name")
    if not target.parent.is_dir():
        raise ValueError(f"out: expected a name in a folder that is there, got {str(target)!r}")
    if not adapters:
        raise ValueError("adapters: expected at least one")
    packed = [key for key, kind in base.dtypes.items() if kind.is_floating_point and kind not in DENSE]
    if dtype is not None and packed:
        raise CheckpointError(
            str(base.folder),
            f"key {shown(packed[0])}: is {base.dtypes[packed[0]]}, whose scales are in other tensors; dtype has to be "
            "None",
        )
    model, brought = _adapted(base, [path for path, _ in adapters])
    for number, (_, weight) in enumerate(adapters):
        for _, layer in _layers(model):
            if weight != 1 and f"adapter{number}" in layer.adapter_names:
                layer.set_scale(f"adapter{number}", weight)
    layers, replaced = _plan(base, model, brought)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as folder:
        trial = Path(folder) / target.name
        trial.mkdir()
        done = Merge(len(base.shapes), {}, sorted(replaced), [])
        with torch.no_grad():
            _write_shards(base, layers, replaced, trial, dtype, safe_merge, progressbar, done)
        _copy_others(base, trial, dtype, done)
        _put(trial, target)
    return done


def _put(trial: Path, target: Path) -> None:
    """Give a folder its name; what had it before is there until then, and again if that fails."""
    if not os.path.lexists(target):
        os.replace(trial, target)
        return
    # Beside it and not in the folder that is thrown away: a process that is killed here leaves it whole.
    old = target.parent / f".{target.name}.{secrets.token_hex(8)}.old"
    try:
        os.replace(target, old)
        os.replace(trial, target)
    except BaseException:
        # The folders say what was done: an interrupt may strike between a rename and the next line.
        if os.path.lexists(old) and not os.path.lexists(target):
            os.replace(old, target)
        raise
    shutil.rmtree(old)


def _layers(model: PeftModel) -> Iterable[tuple[str, AdapterLayer]]:
    found = model.base_model.model.named_modules()
    return [(path, module) for path, module in found if isinstance(module, AdapterLayer)]


def _brought(model: nn.Module, path: str) -> dict[str, nn.Parameter]:
    """Give memory to the weights that an adapter brings along, as PEFT saves embeddings that are adapted.

    Returns:
        The parameters of the model by their names.
    """
    file = Path(path) / WEIGHTS_NAME
    if not file.is_file():
        return {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    counted = Counter(map(id, parameters.values()))
    found = {}
    for key in header_shapes(file):
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        empty = parameters.get(name)
        if empty is not None and empty.dtype.is_floating_point and counted[id(empty)] == 1:
            holder, _, last = name.rpartition(".")
            # Whoever does not write it leaves it so.
            found[name] = nn.Parameter(torch.full(empty.shape, torch.nan, dtype=empty.dtype), requires_grad=False)
            model.get_submodule(holder)._parameters[last] = found[name]
    return found


def _adapted(base: Base, adapters: Sequence[str]) -> tuple[PeftModel, dict[str, nn.Parameter]]:
    """Return the model with all adapters, and the weights of the base model that they brought along, by name."""
    model = empty_model(base)
    adapted: PeftModel | None = None
    brought: dict[str, nn.Parameter] = {}
    for path in adapters:
        brought |= _brought(model, path)
    for number, path in enumerate(adapters):
        name = f"adapter{number}"
        try:
            # Such factors start as a part of the weight, which is not there; to look for it may take hours.
            if not os.path.isfile(path):
                how = getattr(PeftConfig.from_pretrained(path), "init_lora_weights", True)
                if starts_inside(how):
                    raise CheckpointError(
                        path,
                        f"init_lora_weights={how!r}: the factors start as a part of the base weight: merge it on the "
                        "model in memory",
                    )
            if adapted is None:
                adapted = PeftModel.from_pretrained(model, path, adapter_name=name)
            else:
                adapted.load_adapter(path, name)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            # An adapter that brings weights of the base model writes into one that has no memory.
            raise CheckpointError(
                path, f"cannot be merged from files: {error}; merge it on the model in memory"
            ) from None
    assert adapted is not None
    adapted.base_model.set_adapter([f"adapter{number}" for number in range(len(adapters))])
    for config in adapted.peft_config.values():
        if config.bias_mode != "none":
            raise CheckpointError(adapters[0], f"bias={config.bias_mode!r}: merge it on the model in memory")
    return adapted, brought


# -- what belongs to what ---------------------------------------------------------------------------------------------


def _plan(
    base: Base, model: PeftModel, brought: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[str, AdapterLayer]], dict[str, Tensor]]:
    """Return the layer of every key that merging changes, by its weight, and the tensors that replace others.

    Args:
        base: The files.
        model: The model with the adapters.
        brought: Weights of the base model that came with them, by name.

    Raises:
        CheckpointError: A weight is in no file, of another shape, shared, or of a layer that cannot be merged.
    """
    inner = model.base_model.model
    prefix = getattr(inner, "base_model_prefix", "") or ""
    owners: dict[int, list[str]] = {}
    for path, parameter in inner.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    layers: dict[str, tuple[str, AdapterLayer]] = {}
    replaced: dict[str, Tensor] = {}
    problems = []
    if not list(_layers(model)) and not any(isinstance(m, ModulesToSaveWrapper) for m in inner.modules()):
        problems.append("the adapter changes no layer of the model that can be written")
    for path, layer in _layers(model):
        name = f"{path}.{layer.weight_name}"
        key = _key(base, name, prefix)
        try:
            layer.check_merge()
        except ValueError as error:
            problems.append(f"module {shown(path)}: {error}")
            continue
        if key is None:
            problems.append(
                f"module {shown(path)}: no file has {shown(name)}; its library renames or fuses weights on loading: "
                "merge it on the model in memory"
            )
        elif base.dtypes[key] not in DENSE:
            problems.append(f"key {shown(key)}: is {base.dtypes[key]}; merge it on the model in memory, dequantised")
        elif base.shapes[key] != layer.weight.shape:
            problems.append(f"key {shown(key)}: expected {tuple(layer.weight.shape)}, got {tuple(base.shapes[key])}")
        elif len(owners[id(layer.weight)]) > 1:
            shared = " and ".join(owners[id(layer.weight)])
            problems.append(f"module {shown(path)}: its weight is shared ({shared}); merge it on the model in memory")
        else:
            layers[key] = (path, layer)
    for path, wrapper in inner.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and wrapper.active_adapters:
            before = dict(wrapper.original_module.named_parameters())
            for name, tensor in wrapper.modules_to_save[wrapper.active_adapters[0]].state_dict().items():
                key = _key(base, f"{path}.{name}", prefix)
                if name in before and len(owners[id(before[name])]) > 1:
                    shared = " and ".join(one.replace(".original_module.", ".") for one in owners[id(before[name])])
                    problems.append(
                        f"module {shown(path)}: what replaces it was shared ({shared}); merge it on the model in memory"
                    )
                elif key is None or base.shapes[key] != tensor.shape:
                    problems.append(f"module {shown(path)}: no file has {shown(name)} of shape {tuple(tensor.shape)}")
                else:
                    replaced[key] = tensor
    for name, tensor in brought.items():
        key = _key(base, name, prefix)
        if key is None or base.shapes[key] != tensor.shape or (key not in replaced and bool(tensor.isnan().any())):
            problems.append(f"key {shown(name)}: the adapter brings it along, and no file has it in this shape")
        else:
            replaced.setdefault(key, tensor)
    if problems:
        raise CheckpointError(str(base.folder), *capped(problems, "problems"))
    return layers, replaced


def _key(base: Base, name: str, prefix: str) -> str | None:
    """Return the key of a parameter: its path, with or without what transformers puts before a headless model."""
    name = name.replace(".base_layer.", ".")
    for key in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if key in base.shapes:
            return key
    return None


# -- writing ----------------------------------------------------------------------------------------------------------


def _write_shards(
    base: Base,
    layers: Mapping[str, tuple[str, AdapterLayer]],
    replaced: Mapping[str, Tensor],
    trial: Path,
    dtype: torch.dtype | None,
    safe_merge: bool,
    progressbar: bool,
    done: Merge,
) -> None:
    from safetensors import safe_open
    from tqdm import tqdm

    size = 0
    where: dict[str, str] = {}
    with tqdm(total=len(base.shapes), desc="Merging", disable=not progressbar) as bar:
        for name, keys in base.shards.items():
            layout = {key: (_dtype_of(key, base, replaced, dtype), base.shapes[key]) for key in keys}
            with safe_open(base.folder / name, framework="pt") as file, open(trial / name, "wb") as stream:

                def tensor_of(key: str, file: Any = file) -> Tensor:
                    tensor = replaced[key] if key in replaced else file.get_tensor(key)
                    if key in layers:
                        path, layer = layers[key]
                        tensor, done.lost[path] = _merged(layer, path, tensor, dtype, safe_merge)
                    elif dtype is not None and tensor.is_floating_point():
                        tensor = _converted(key, tensor, dtype, safe_merge)
                    bar.update()
                    return tensor

                write_in_turn(stream, layout, file.metadata(), tensor_of)
            where |= dict.fromkeys(keys, name)
            size += sum(kind.itemsize * shape.numel() for kind, shape in layout.values())
            done.files.append(name)
    if base.index is not None:
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2, sort_keys=True)
        (trial / base.index).write_text(text + "\n")
        done.files.append(base.index)


def _converted(key: str, tensor: Tensor, dtype: torch.dtype, safe: bool) -> Tensor:
    found = tensor.to(dtype)
    # Infinities that were there may be meant, as those of masks are.
    if safe and not torch.equal(found.isinf(), tensor.isinf()):
        raise ValueError(f"dtype: key {shown(key)} has numbers that are infinite in {dtype}; expected a wider one")
    return found


def _dtype_of(key: str, base: Base, replaced: Mapping[str, Tensor], dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that a tensor is written in."""
    found = replaced[key].dtype if key in replaced else base.dtypes[key]
    return found if dtype is None or not found.is_floating_point else dtype


def _merged(
    layer: AdapterLayer, path: str, weight: Tensor, dtype: torch.dtype | None, safe_merge: bool
) -> tuple[Tensor, float]:
    """Return the merged weight, and the part of the update that its rounding takes."""
    # What the rounding of half precision takes is known well enough from float32, which takes half of the memory.
    wide = weight.to(torch.float32 if dtype is None and weight.dtype in HALF else torch.float64)
    found = _with_weight(layer, wide)
    if set(found) - {layer.weight_name}:
        raise CheckpointError(path, "its bias changes too; merge it on the model in memory")
    if safe_merge:
        check_finite(found, layer.active_adapters, f"of {path!r} ")
    if layer.weight_name not in found:
        return weight if dtype is None else weight.to(dtype), 0.0
    exact = found.pop(layer.weight_name)
    size = torch.dist(exact, wide).item()
    merged = exact.to(dtype) if dtype is not None else _with_weight(layer, weight)[layer.weight_name]
    if safe_merge:
        # A number that is finite in a wider dtype may not be in this one.
        check_finite({layer.weight_name: merged}, layer.active_adapters, f"of {path!r} ")
    # No third wide matrix: this is the most that a merge holds.
    return merged, torch.dist(exact, wide.copy_(merged)).item() / size if size else 0.0


def _with_weight(layer: AdapterLayer, weight: Tensor) -> dict[str, Tensor]:
    """Compute what a weight becomes, which the layer has only meanwhile."""
    holder, name = layer._holder, layer.weight_name
    empty = holder._parameters[name]
    holder._parameters[name] = nn.Parameter(weight, requires_grad=False)
    try:
        return layer.merged_tensors()
    finally:
        holder._parameters[name] = empty


def _copy_others(base: Base, trial: Path, dtype: torch.dtype | None, done: Merge) -> None:
    for where, folders, names in os.walk(base.folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(where).relative_to(base.folder)
        for name in sorted(names):
            if not name.startswith(".") and not name.endswith(OTHER_WEIGHTS) and Path(where, name).is_file():
                (trial / inside).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(where, name), trial / inside / name)
                done.files.append((inside / name).as_posix())
    if dtype is not None:
        said = {name: str(dtype).removeprefix("torch.") for name in ("dtype", "torch_dtype") if name in base.config}
        (trial / CONFIG).write_text(json.dumps({**base.config, **said}, indent=2, sort_keys=True) + "\n")
