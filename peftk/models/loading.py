"""Reading a saved adapter: the file is read, checked and planned in full before the model is touched."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint.container import shown
from ..checkpoint.key_mapping import Rename, check_key_mapping, describe_renamed_modules, rename_names, renamer
from ..methods._base_layer import kind_of
from ..nn import LAYERS, PeftConfig
from ..nn.base.config import check_bool, read_from
from ..nn.base.offloading import TAKE_OFF
from .adapters import Tuner
from .embeddings import embedding_tensors, tell_missing
from .file_keys import PREFIX, as_in_file, as_in_memory, same_meaning, without_values
from .names import unwrapped, without_wrappers
from .plan import Plan, copy_into
from .targets import candidates, resolve, unknown_names

MOST_SAID = 2_000
T = TypeVar("T")


def read_config(folder: str | os.PathLike[str]) -> PeftConfig:
    """Read the configuration of a saved adapter."""
    return _config(folder, config_values(folder))


def config_values(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the content of the configuration file of a saved adapter."""
    from ..checkpoint import peft as files

    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise ValueError(f"model_id: expected the folder of a saved adapter (nothing is downloaded), got {folder!r}")
    return files.read_config(folder)


def _config(folder: str | os.PathLike[str], values: Mapping[str, Any]) -> PeftConfig:
    return naming_the_file(folder, lambda: PeftConfig.from_dict(values))


def naming_the_file(folder: str | os.PathLike[str], read: Callable[[], T]) -> T:
    """Call `read`, with the configuration file in front of every error, and every warning, about what it says."""
    from ..checkpoint import CheckpointError
    from ..checkpoint.peft import CONFIG_NAME

    file = os.path.join(folder, CONFIG_NAME)
    # In a context of its own, the file is forgotten with it: an interruption has nothing to leave behind.
    context = contextvars.copy_context()
    context.run(read_from.set, file)
    try:
        return context.run(read)
    except CheckpointError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        said = str(error)
        if len(said) > MOST_SAID:
            # What stands in a file must not flood whoever reads the message.
            said = f"{said[:MOST_SAID]}... ({len(said)} letters)"
        if isinstance(error, ValueError):
            raise CheckpointError(file, said) from None
        raise type(error)(f"{file}: {said}") from None


class LoadResult(NamedTuple):
    """What `set_peft_model_state_dict` did not find a partner for.

    Attributes:
        missing_keys: Names in the model's state dict that got no value, those of the base model among them.
        unexpected_keys: Keys that stand for nothing in the adapter.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class Reading(NamedTuple):
    """A saved adapter that was read and checked.

    Attributes:
        plan: The adapter.
        fill: Copies the values in; it cannot be refused.
        changed: Tensors of the model that `fill` writes to.
    """

    plan: Plan
    fill: Callable[[], None]
    changed: list[Tensor]


def read_into_plan(
    tuner: Tuner,
    folder: str | os.PathLike[str],
    name: str,
    is_trainable: bool,
    autocast: bool,
    saved: Mapping[str, Any] | None = None,
    key_mapping: Mapping[str, str] | None = None,
    given: PeftConfig | None = None,
) -> Reading:
    """Read and check a saved adapter; nothing is written to the model yet.

    `saved` is the content of the configuration file, if the caller has read it: what it has checked there must be what
    is loaded. `given` takes the place of that file. A new adapter is planned without memory, and gets it once the
    shapes in the file are those of the plan:
    a configuration alone costs nothing.
    """
    from ..checkpoint import peft as files

    check_bool("is_trainable", is_trainable)
    check_key_mapping(key_mapping)
    saved = config_values(folder) if saved is None and given is None else saved
    # A configuration that is given need not be the one that the tensors were saved with.
    config = copy.deepcopy(given) if saved is None and given is not None else _config(folder, saved or {})
    naming_the_file(folder, lambda: config.settle_with_file(lambda: files.read_shapes(folder)))
    config.inference_mode = not is_trainable
    model = tuner.model
    if name in tuner.peft_config:
        plan = tuner._plan_of(name)
        rename_fields(model, config, key_mapping)
        naming_the_file(folder, lambda: _check_load_over(tuner, plan, config))
    else:
        tuner._check_new(name, config)
        rename_fields(model, config, key_mapping)
        plan = naming_the_file(folder, lambda: _plan_from_file(tuner, folder, name, config, autocast))
    rename = rename_of(model, folder, tuner._file_tensors(plan), key_mapping)
    values, embeddings = _values(tuner, folder, plan, config, saved, rename)
    if name not in tuner.peft_config:
        if plan.adapters:
            tell_missing(model, plan, os.path.join(folder, files.WEIGHTS_NAME), {*values})
        plan.materialise()
        if embeddings:
            # What is trained has its memory now.
            found = embedding_tensors(model, plan, copies=True)
            embeddings = {key: found[key] for key in embeddings}
    targets = {**tuner._file_tensors(plan), **embeddings}
    check_not_merged(tuner, targets)
    check_there(targets)
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    changed = [targets[key] for key in values if id(targets[key]) in own]

    def fill() -> None:
        copy_into(targets, values)
        tuner._take_pattern(name, config)

    return Reading(plan, fill, changed)


def _plan_from_file(
    tuner: Tuner, folder: str | os.PathLike[str], name: str, config: PeftConfig, autocast: bool
) -> Plan:
    with _telling_renames(tuner.model, folder, config):
        return tuner._plan(name, config, autocast_adapter_dtype=autocast, initialise=False, strict=False)


def rename_fields(model: nn.Module, config: PeftConfig, mapping: Mapping[str, str] | None) -> None:
    """Let names of a configuration that the model does not have go through `key_mapping` as the keys do."""
    if not mapping:
        return
    for field in ("target_modules", "modules_to_save"):
        names = getattr(config, field, None)
        if names and not isinstance(names, str):
            unknown = unknown_names(model, names)
            setattr(config, field, type(names)([*({*names} - unknown), *rename_names(unknown, mapping)]))
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, dict):
        unknown = unknown_names(model, tokens)
        renamed = {name: next(iter(rename_names([name], mapping))) if name in unknown else name for name in tokens}
        config.trainable_token_indices = {renamed[name]: indices for name, indices in tokens.items()}


@contextlib.contextmanager
def _telling_renames(model: nn.Module, folder: str | os.PathLike[str], config: PeftConfig) -> Iterator[None]:
    """Where the targets of a file are not in the model, say so if its modules are renamed ones of the model."""
    from ..checkpoint import peft as files

    try:
        yield
    except ValueError as error:
        names = getattr(config, "target_modules", None)
        if not isinstance(names, (set, list)) or unknown_names(model, names) != {*names}:
            raise
        keys = (key.removeprefix(PREFIX).split(".") for key in files.read_shapes(folder))
        containers = {name for layer in LAYERS for name in layer.adapter_layer_names}
        ends = ((parts, next((i for i, p in enumerate(parts) if p in containers), 0)) for parts in keys)
        layers = [path for path, module in candidates(model).items() if kind_of(module) is not None]
        hint = describe_renamed_modules((".".join(parts[:end]) for parts, end in ends if end), layers)
        if hint is None:
            raise
        raise ValueError(f"target_modules: {hint} ({error})") from None


def _check_load_over(tuner: Tuner, plan: Plan, config: PeftConfig) -> None:
    same_meaning(tuner.peft_config[plan.name], config, plan.adapters)
    merged = [path for path, layer in tuner._layers() if plan.name in layer.merged_adapters]
    if merged:
        raise ValueError(f"adapter_name: {plan.name!r} is merged into {merged[0]!r}; unmerge it before loading over it")
    if plan.adapters and set(resolve(tuner.model, config, strict=False)) != set(plan.adapters):
        raise ValueError(
            f"target_modules: the file names {config.target_modules}, which are not the modules that adapter "
            f"{plan.name!r} has in memory; load it under a new name"
        )


def rename_of(
    model: nn.Module, folder: str | os.PathLike[str], expected: Mapping[str, Tensor], mapping: Mapping[str, str] | None
) -> Rename:
    """Return what the keys of the file go through: `mapping` or, where they do not fit, the model's own.

    Parts of keys that only wrappers add, as PEFT leaves them in its files, are taken out either way.
    """
    from ..checkpoint import peft as files

    if mapping is not None:
        rename = renamer(mapping)
        return lambda key: rename(without_wrappers(key))
    # What transformers renames in the base model's own files.
    own = getattr(unwrapped(model), "_checkpoint_conversion_mapping", None)
    if not own or expected.keys() <= files.read_shapes(folder).keys():
        return without_wrappers
    check_key_mapping(own)
    rename = renamer(own)
    return lambda key: rename(without_wrappers(key))


def _values(
    tuner: Tuner,
    folder: str | os.PathLike[str],
    plan: Plan,
    config: PeftConfig,
    saved: Mapping[str, Any] | None,
    rename: Rename,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the values of a plan; return them, and those tensors of the base model that the file holds beside them."""
    from ..checkpoint import CheckpointError
    from ..checkpoint import peft as files

    targets = as_in_file(tuner._layers(), plan.name, config, without_values(tuner._file_tensors(plan)))
    try:
        values = files.read_adapter(folder, *expected_of(targets), saved, rename)
        return as_in_memory(tuner._layers(), plan.name, config, values), {}
    except CheckpointError:
        # Whole embeddings stand in the file where the vocabulary was resized, and PEFT adds those of adapted ones.
        embeddings = embedding_tensors(tuner.model, plan, copies=True)
        shapes = {rename(key): shape for key, shape in files.read_shapes(folder).items()}
        found = {key: tensor for key, tensor in embeddings.items() if key in shapes}
        if not found:
            raise
    _check_vocabulary(os.path.join(folder, files.WEIGHTS_NAME), found, shapes)
    values = files.read_adapter(folder, *expected_of({**targets, **found}), saved, rename)
    return as_in_memory(tuner._layers(), plan.name, config, values), found


def _check_vocabulary(file: str, embeddings: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Say what to do where a file holds the embeddings of another vocabulary than the model has."""
    from ..checkpoint import CheckpointError

    for key, tensor in embeddings.items():
        shape = shapes[key]
        if shape != tensor.shape and shape[1:] == tensor.shape[1:]:
            raise CheckpointError(
                file,
                f"key {shown(key)}: these are embeddings of {shape[0]} entries, and the model has {len(tensor)}; call "
                f"resize_token_embeddings({shape[0]}) of the base model before loading",
            )


def check_not_merged(tuner: Tuner, targets: dict[str, Tensor]) -> None:
    """Refuse a file with weights or biases of the base model that stand merged: unmerging would undo the load."""
    merged = {
        id(tensor): path
        for path, layer in tuner._layers()
        for key, original in layer._original.items()
        for tensor in (original, getattr(layer._holder, key))
    }
    for key, tensor in targets.items():
        if id(tensor) in merged:
            raise ValueError(
                f"model_id: the file holds {key!r}, a tensor of the base model, and adapters are merged into it at "
                f"{merged[id(tensor)]!r}; unmerge them before loading"
            )


def check_there(targets: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor that is to be written has no memory."""
    away = [key for key, tensor in targets.items() if tensor.is_meta]
    if away:
        raise ValueError(
            f"model_id: {shown(away)} of the model are offloaded (on the meta device), where nothing can be written; "
            f"{TAKE_OFF}, load, and offload again"
        )


def expected_of(targets: dict[str, Tensor]) -> tuple[dict[str, torch.Size], dict[str, torch.dtype]]:
    """Return what `read_adapter` is told to expect: the shapes, and the dtypes of what holds integers."""
    shapes = {key: tensor.shape for key, tensor in targets.items()}
    return shapes, {key: tensor.dtype for key, tensor in targets.items() if not tensor.is_floating_point()}
