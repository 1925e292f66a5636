"""Writing safetensors files, and putting several files in the place of their predecessors as one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .container import (
    CODES,
    DIGESTS_KEY,
    METADATA_KEY,
    capped,
    digest,
    memory,
    metadata_digest,
    name_problem,
    nonfinite,
    shown,
)

LOCK_SECONDS = 60.0


def _unsavable(name: str, tensor: Tensor) -> str | None:
    problem = name_problem(name)
    if problem is not None:
        return f"key {problem}"
    if hasattr(type(tensor), "__tensor_flatten__"):
        return f"key {shown(name)}: expected a plain tensor, got {type(tensor).__name__}; gather it first"
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return f"key {shown(name)}: expected a dense tensor with memory, got {tensor.layout} on {tensor.device}"
    if tensor.dtype not in CODES:
        return f"key {shown(name)}: dtype expected one of {', '.join(map(str, CODES))}, got {tensor.dtype}"
    if tuple(tensor.shape) == (0,):
        return f"key {shown(name)}: shape expected with elements, got (0,): a sharded parameter? gather it first"
    return None


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _shared(tensors: Mapping[str, Tensor]) -> list[str]:
    """Pairs of tensors whose memory overlaps: saved, they would come back as two independent tensors."""
    by_device: dict[str, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            by_device.setdefault(str(tensor.device), []).append((*_span(tensor), name))
    problems = []
    for spans in by_device.values():
        spans.sort()
        furthest, owner = 0, ""
        for begin, end, name in spans:
            if begin < furthest:
                problems.append(
                    f"keys {shown(owner)} and {shown(name)}: expected separate memory, got tensors that share it; "
                    "pass a clone of one, or save it once"
                )
            if end > furthest:
                furthest, owner = end, name
    return problems


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors as a file holds them, after refusing what a file could not give back.

    Every value is read once, here: another thread may go on training, and what is checked, what is digested and what
    is written must be the same bytes.

    Returns:
        Name to contiguous CPU tensor with memory of its own.

    Raises:
        TypeError: `tensors` is not a mapping from string to tensor.
        ValueError: empty, bad names, sparse, quantized, sharded or meta tensors, dtypes that the format lacks, NaN or
            infinity, tensors that share memory; every key at fault is named.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors: expected a dict from name to tensor, got {type(tensors).__name__}")
    if not tensors:
        raise ValueError("tensors: expected at least one tensor, got none")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors: expected names that are strings, got {shown(name)}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors: key {shown(name)}: expected a tensor, got {type(tensor).__name__}")
    copies: dict[str, Tensor] = {}
    problems = []
    for name, tensor in tensors.items():
        problem = _unsavable(name, tensor)
        if problem is None:
            copies[name] = tensor.detach().to("cpu", copy=True).resolve_conj().resolve_neg().contiguous()
            found = nonfinite(copies[name])
            problem = None if found is None else f"key {shown(name)}: values expected finite, got {found}"
        if problem is not None:
            problems.append(problem)
    problems = problems or _shared(tensors)
    if problems:
        raise ValueError("tensors: " + "; ".join(capped(problems, "keys")))
    return copies


def write_safetensors(stream: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors`, which `snapshot` has made, with a sha256 of each in the metadata."""
    # Not when peftk is imported: `import peftk` loads torch and nothing else.
    from safetensors.torch import save

    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    digests[METADATA_KEY] = metadata_digest(dict(metadata))
    full = {**metadata, DIGESTS_KEY: json.dumps(digests, sort_keys=True, separators=(",", ":"))}
    stream.write(save(dict(tensors), metadata=full))


def write_in_turn(
    stream: IO[bytes],
    layout: Mapping[str, tuple[torch.dtype, torch.Size]],
    metadata: Mapping[str, str] | None,
    tensor_of: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file of which one tensor at a time is in memory, without digests.

    Its library writes tensors that are all there.

    Args:
        stream: Where to.
        layout: Name to dtype and shape.
        metadata: The strings of the header.
        tensor_of: Returns the tensor of a name; called once for each, in the order of the file.

    Raises:
        ValueError: A tensor has another dtype or shape than `layout` says.
    """
    # The widest first, so that all are aligned.
    order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = layout[name]
        begin, end = end, end + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        tensor = tensor_of(name).detach().cpu().contiguous()
        if (tensor.dtype, tensor.shape) != layout[name]:
            raise ValueError(f"key {shown(name)}: expected {layout[name]}, got {(tensor.dtype, tensor.shape)}")
        if tensor.numel():
            stream.write(memory(tensor))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold an exclusive lock on the folder if the system has one; says whether it does.

    Ranks of one training job that all save to one folder would otherwise take each other's files away.
    """
    descriptor = None
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    if descriptor is None:
        yield False
        return
    try:
        held = False
        deadline = time.monotonic() + LOCK_SECONDS
        while not held:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{folder}: another process has been saving here for {LOCK_SECONDS} s") from None
                time.sleep(0.02)
            except OSError:
                break
        yield held
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leftovers(folder: Path, names: Iterable[str]) -> list[str]:
    """The files that an interrupted `replace_together` of `names` left in `folder`."""
    pattern = re.compile(r"\.(?:" + "|".join(map(re.escape, names)) + r")\.[0-9a-f]{16}\.(?:tmp|old)")
    try:
        return sorted(found for found in os.listdir(folder) if pattern.fullmatch(found))
    except OSError:
        return []


def _write_new(path: Path, mode_of: Path, write: Callable[[IO[bytes]], object]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(descriptor, "wb") as stream:
        with contextlib.suppress(FileNotFoundError):
            old = os.lstat(mode_of).st_mode
            if stat.S_ISREG(old) and hasattr(os, "fchmod"):
                os.fchmod(descriptor, stat.S_IMODE(old))
        write(stream)
        stream.flush()
        os.fsync(descriptor)


def _undo(moves: list[tuple[Path, Path]], cause: BaseException) -> None:
    for source, target in reversed(moves):
        # An interrupt may strike between a rename and the next line, so the folder decides what was done.
        if not os.path.lexists(source) and os.path.lexists(target):
            try:
                os.replace(target, source)
            except OSError as error:
                raise OSError(
                    f"{source.parent}: the save failed ({cause}) and the earlier files could not be put "
                    f"back ({error}); they are whole under the names that end in '.old'"
                ) from cause


def replace_together(folder: Path, files: dict[str, Callable[[IO[bytes]], object]]) -> None:
    """Write the named files and put them in the place of the old ones: all of them or none.

    Everything is first written and synced under temporary names. Then the old files step aside, last name first, and
    the new ones take their places, last name last. No rename covers two files, so there is a moment when a killed
    process leaves a folder half changed; in that moment the *last* file does not exist under its own name. A loader
    that needs it (here the config, which every loader opens first) fails, and can never see an old and a new file
    together. Both generations are then whole, under names ending in `.old` and `.tmp`. An exception, in contrast to a
    kill, puts everything back.

    Raises:
        ValueError: a name is taken by something that is not a file.
        OSError: writing failed; the old files are as they were and the temporary ones gone.
    """
    for name in files:
        taken = folder / name
        with contextlib.suppress(FileNotFoundError):
            # Asked once: between two questions another process's save may move the file.
            mode = os.lstat(taken).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                raise ValueError(f"{taken}: expected a file or nothing, got a folder or device")
    token = secrets.token_hex(8)
    new = {name: folder / f".{name}.{token}.tmp" for name in files}
    old = {name: folder / f".{name}.{token}.old" for name in files}
    with locked(folder) as alone:
        stale = leftovers(folder, files) if alone else []
        moves: list[tuple[Path, Path]] = []
        try:
            for name, write in files.items():
                _write_new(new[name], folder / name, write)
            for name in reversed(files):
                if os.path.lexists(folder / name):
                    moves.append((folder / name, old[name]))
                    os.replace(*moves[-1])
            for name in files:
                moves.append((new[name], folder / name))
                os.replace(*moves[-1])
        except BaseException as error:
            try:
                _undo(moves, error)
            finally:
                _remove(new.values())
            raise
        _remove([*old.values(), *(folder / name for name in stale)])


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)
