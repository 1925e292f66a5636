"""Adapters in the file format of Hugging Face PEFT: `adapter_model.safetensors` beside `adapter_config.json`."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .container import CONFIG_DIGEST_KEY, CheckpointError, capped, config_digest, parse_json, shown
from .key_mapping import Rename, describe_rename
from .reader import REFUSED_PICKLE, header_shapes, open_inside, read_safetensors, scan_safetensors
from .recognise import recognise, told
from .writer import leftovers, locked, replace_together, snapshot, write_safetensors

__all__ = ["read_adapter", "read_config", "write_adapter"]

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PICKLE_NAME = "adapter_model.bin"
MAX_CONFIG_BYTES = 1_000_000
MAX_CONFIG_DEPTH = 32
LEFT_SHOWN = 4
T = TypeVar("T")

logger = logging.getLogger(__name__)


def _folder(folder: str | os.PathLike[str]) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or isinstance(os.fspath(folder), bytes):
        raise TypeError(f"folder: expected a path, got {type(folder).__name__}")
    if "\0" in os.fspath(folder) or not os.fspath(folder):
        raise ValueError(f"folder: expected a path, got {os.fspath(folder)!r}")
    return Path(folder)


def _existing(folder: str | os.PathLike[str], name: str) -> Path:
    """The folder, after checking that it holds `name`; the error says what it holds instead."""
    path = _folder(folder)
    if not path.is_dir():
        what = "a file" if path.exists() else "nothing"
        known = told(path) if path.is_file() else None
        of = "" if known is None else f", which has {known}"
        raise CheckpointError(path, f"expected an existing folder with {name}, got {what}{of}")
    if os.path.lexists(path / name):
        return path
    # What `_between_saves` looks for.
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path / name))
    left = leftovers(path, [WEIGHTS_NAME, CONFIG_NAME])
    if left:
        raise CheckpointError(
            path / name,
            f"is missing, because a save to this folder was killed half-way; it left {', '.join(left[:LEFT_SHOWN])}. "
            "Rename every '.old' file back to its name for the earlier adapter, or every '.tmp' file for the newer",
        ) from missing
    if name == WEIGHTS_NAME and os.path.lexists(path / PICKLE_NAME):
        refused = REFUSED_PICKLE.format(what=PICKLE_NAME)
        raise CheckpointError(path / PICKLE_NAME, f"{name} is missing and {refused}") from missing
    # Published adapters are often single files of other programs.
    found = sorted(file for file in path.glob("*.safetensors") if file.is_file())[:LEFT_SHOWN]
    there = "".join(f"; {file.name} is there, and has {known}" for file in found if (known := told(file)) is not None)
    raise CheckpointError(path / name, f"expected this file, but the folder does not hold it{there}") from missing


def _between_saves(folder: str | os.PathLike[str], read: Callable[[], T]) -> T:
    """Call `read` and, where a file was missing, once more while nobody saves to the folder.

    A save takes the files away for a moment. Only what is missing while nobody saves was never there, or was left so by
    a process that was killed.
    """
    try:
        return read()
    except CheckpointError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
    try:
        with locked(_folder(folder)):
            return read()
    except TimeoutError as error:
        raise CheckpointError(folder, f"cannot be read: {error}") from None


def write_config(folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Save a configuration alone, as `write_adapter` does beside its tensors."""
    raw = _config_bytes(config)
    path = _folder(folder)
    path.mkdir(parents=True, exist_ok=True)
    replace_together(path, {CONFIG_NAME: lambda stream: stream.write(raw)})


def _check_json(value: Any, where: str, depth: int = 0) -> None:
    """Refuse what `json` would write in a form that reads back as something else."""
    if depth >= MAX_CONFIG_DEPTH:
        raise ValueError(f"{where}: nested deeper than {MAX_CONFIG_DEPTH} levels")
    if isinstance(value, Mapping):
        for name, child in value.items():
            if not isinstance(name, str):
                raise TypeError(f"{where}: expected keys that are strings, got {shown(name)}")
            _check_json(child, f"{where}[{shown(name)}]", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            _check_json(child, f"{where}[{index}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value}")
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        raise TypeError(f"{where}: expected JSON (dict, list, string, number), got {type(value).__name__}")


def _config_bytes(config: Mapping[str, Any]) -> bytes:
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a dict, got {type(config).__name__}")
    _check_json(config, "config")
    # The fields are sorted, as by PEFT. What is in them is not: of several patterns the first one counts.
    raw = (json.dumps(dict(sorted(config.items())), indent=2, allow_nan=False) + "\n").encode()
    if len(raw) > MAX_CONFIG_BYTES:
        raise ValueError(f"config: expected at most {MAX_CONFIG_BYTES} bytes of JSON, got {len(raw)}")
    parse_json(raw, max_depth=MAX_CONFIG_DEPTH)
    return raw


def write_adapter(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save an adapter so that Hugging Face PEFT and `read_adapter` load it; a failed save changes nothing.

    Both files are written under temporary names and then take the place of the old ones together
    (`writer.replace_together` says what a kill in between leaves). The metadata holds `format: pt`, which PEFT and
    transformers ask for, `peftk_sha256`, a JSON object of the sha256 of every tensor, and `peftk_config_sha256`, that
    of the configuration; all are checked on reading.

    Args:
        folder: made if it does not exist.
        tensors: key in the file to tensor, any floating or integer dtype and device; saved contiguous, as they are.
        config: the content of adapter_config.json; dicts, lists, strings, finite numbers, None.
        metadata: further strings for the header of the file with the tensors.

    Raises:
        TypeError: an argument, key or config field of the wrong type.
        ValueError: tensors that share memory, hold NaN or infinity, are complex, or cannot be stored: every key is
            named, and nothing has been written.
        OSError: the disk refused; the old files are as they were.

    Example:
        >>> write_adapter("adapter", {"base_model.model.fc.lora_A.weight": a}, {"peft_type": "LORA"})  # doctest: +SKIP
    """
    path = _folder(folder)
    copies = snapshot(tensors)
    wrong = [
        f"key {shown(name)}: dtype expected floating or integer, got {tensor.dtype}"
        for name, tensor in copies.items()
        if tensor.dtype.is_complex
    ]
    if wrong:
        raise ValueError("tensors: " + "; ".join(capped(wrong, "keys")))
    raw = _config_bytes(config)
    # Of what a reader will see in the file, where a tuple has become a list.
    covered = config_digest(parse_json(raw, max_depth=MAX_CONFIG_DEPTH))
    if path.exists() and not path.is_dir():
        raise ValueError(f"folder: expected a folder or nothing, got the file {path}")
    path.mkdir(parents=True, exist_ok=True)
    replace_together(
        path,
        {
            WEIGHTS_NAME: lambda stream: write_safetensors(
                stream, copies, {**(metadata or {}), "format": "pt", CONFIG_DIGEST_KEY: covered}
            ),
            CONFIG_NAME: lambda stream: stream.write(raw),
        },
    )


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of adapter_config.json: data only, which fields are known is for the caller to say.

    Raises:
        CheckpointError: no such folder or file, more than 1 MB, not UTF-8, not a JSON object, duplicate keys, NaN or
            infinity, more than 32 levels of nesting.

    Example:
        >>> read_config("adapter")["peft_type"]  # doctest: +SKIP
        'LORA'
    """
    raw = _between_saves(folder, lambda: _config_content(folder))
    try:
        return parse_json(raw, max_depth=MAX_CONFIG_DEPTH)
    except ValueError as error:
        raise CheckpointError(_folder(folder) / CONFIG_NAME, str(error)) from None


def _config_content(folder: str | os.PathLike[str]) -> bytes:
    path = _existing(folder, CONFIG_NAME)
    with open_inside(path, CONFIG_NAME) as (stream, size):
        if size > MAX_CONFIG_BYTES:
            raise CheckpointError(path / CONFIG_NAME, f"expected at most {MAX_CONFIG_BYTES} bytes, got {size}")
        return stream.read(size)


def read_shapes(folder: str | os.PathLike[str]) -> dict[str, torch.Size]:
    """The shapes that the header of adapter_model.safetensors claims, by key; none where it cannot be read.

    What is wrong with it is said by `read_adapter`, which reads the values too and decides.
    """
    with contextlib.suppress(CheckpointError):
        return _between_saves(folder, lambda: header_shapes(_existing(folder, WEIGHTS_NAME) / WEIGHTS_NAME))
    return {}


def _unexpected(names: list[str], expected: Mapping[str, Any], missing: list[str]) -> Iterable[str]:
    # Most often a name that is not expected is one of those that are missing, misspelt.
    absent = set(missing)
    candidates = (missing + [name for name in expected if name not in absent])[:2000]
    for index, name in enumerate(names):
        close = get_close_matches(name[:500], candidates, n=2, cutoff=0.7) if index < LEFT_SHOWN * 2 else []
        hint = f"; closest expected {' or '.join(map(shown, close))}" if close else ""
        yield f"unexpected key {shown(name)}{hint}"


def _check_pair(folder: Path, config: Mapping[str, Any], expected: str | None) -> None:
    """Refuse a configuration that does not belong to the tensors that were read after it.

    Without a digest (`expected` is None) all that can be seen is that the configuration has changed meanwhile.
    """
    got = config_digest(config)
    if got == expected:
        return
    if config_digest(read_config(folder)) != got:
        raise CheckpointError(
            folder / CONFIG_NAME,
            f"another save to this folder came between reading this file and {WEIGHTS_NAME}; load again",
        )
    if expected is not None:
        raise CheckpointError(
            folder / CONFIG_NAME,
            f"sha256 expected {shown(expected)} (metadata {CONFIG_DIGEST_KEY} of {WEIGHTS_NAME}), got {shown(got)}: "
            "it was damaged, changed by hand, or is of another save. Put the saved file back, or save the adapter "
            "again; if the change is on purpose, write the tensors without the metadata: "
            f"safetensors.torch.save_file(safetensors.torch.load_file({WEIGHTS_NAME!r}), {WEIGHTS_NAME!r}, "
            "{'format': 'pt'})",
        )


def _renamed(path: Path, tensors: Mapping[str, Tensor], rename: Rename) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, tensor in tensors.items():
        new = rename(name)
        if new in result:
            raise CheckpointError(
                path, f"two keys, {shown(sources[new])} and {shown(name)}, become one, {shown(new)}, by key_mapping"
            )
        result[new], sources[new] = tensor, name
    return result


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of an adapter, checked as far as the file alone allows: no key or shape is expected.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return dict(_between_saves(folder, lambda: read_safetensors(_existing(folder, WEIGHTS_NAME) / WEIGHTS_NAME)))


def read_adapter(
    folder: str | os.PathLike[str],
    expected: Mapping[str, torch.Size | tuple[int, ...]],
    integers: Mapping[str, torch.dtype] | None = None,
    config: Mapping[str, Any] | None = None,
    rename: Rename | None = None,
) -> dict[str, Tensor]:
    """The tensors of an adapter that fits `expected` exactly; nothing is applied to any model.

    Args:
        folder: holds adapter_model.safetensors.
        expected: key in the file to shape, for every tensor that the model wants.
        integers: key to dtype for those that are not floating, such as the step counter of a batch norm.
        config: what `read_config` gave for this folder; the tensors must be those that were saved with it.
        rename: turns a key of the file into the one that is expected (`key_mapping.renamer`).

    Returns:
        Key to CPU tensor in the dtype of the file, in the order of `expected`.

    Raises:
        TypeError: `expected` is not a mapping to shapes.
        CheckpointError: one message with every problem: missing keys, unexpected keys with the closest expected names,
            wrong shapes or dtypes, NaN or infinity, sha256 that does not agree; or a file that
            cannot be read at all (see `reader.read_safetensors`), or a configuration that is not the one that the
            tensors were saved with.

    Example:
        >>> read_adapter("adapter", {"base_model.model.fc.lora_A.weight": torch.Size([4, 8])})  # doctest: +SKIP
    """
    if not isinstance(expected, Mapping) or not all(isinstance(shape, (tuple, list)) for shape in expected.values()):
        raise TypeError("expected: wanted a dict from key to shape")
    integers = integers or {}
    path = _folder(folder) / WEIGHTS_NAME
    file, problems = _between_saves(folder, lambda: scan_safetensors(_existing(folder, WEIGHTS_NAME) / WEIGHTS_NAME))
    if config is not None and not problems:
        # Before keys and shapes, which a wrong configuration makes wrong too.
        _check_pair(path.parent, config, file.metadata.get(CONFIG_DIGEST_KEY))
    tensors = _renamed(path, file.tensors, rename) if rename is not None else file.tensors
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    both = [name for name in expected if name in tensors]
    if unknown:
        seen = recognise({key: tensor.shape for key, tensor in file.tensors.items()})
        if seen.dialect not in (None, "PEFT", "bare names"):
            problems.insert(0, f"expected the dialect of PEFT, and this file has {seen}")
    hint = describe_rename(tensors, expected) if missing and unknown else None
    if hint is not None:
        raise CheckpointError(path, *problems, hint)
    problems += capped(
        (f"missing key {shown(name)}, expected shape {tuple(expected[name])}" for name in missing),
        "missing keys",
    )
    problems += capped(_unexpected(unknown, expected, missing), "unexpected keys")
    problems += capped(
        (
            f"key {shown(name)}: shape expected {tuple(expected[name])}, got {tuple(tensors[name].shape)}"
            for name in both
            if tuple(tensors[name].shape) != tuple(expected[name])
        ),
        "keys of wrong shape",
    )
    problems += capped(
        (
            f"key {shown(name)}: dtype expected {integers.get(name, 'floating')}, got {tensors[name].dtype}"
            for name in both
            if not (
                tensors[name].dtype == integers[name] if name in integers else tensors[name].dtype.is_floating_point
            )
        ),
        "keys of wrong dtype",
    )
    if problems:
        raise CheckpointError(path, *problems)
    if not file.verified:
        logger.info("%s: unverified: the file carries no sha256 of its tensors (not saved by peftk)", path)
    elif config is not None and CONFIG_DIGEST_KEY not in file.metadata:
        logger.info("%s: %s is unverified: no sha256 of it (saved by an early peftk)", path, CONFIG_NAME)
    return {name: tensors[name] for name in expected}
