"""Reading safetensors files that may come from anybody.

The file is opened once, checked completely and read by peftk itself, straight into the memory of the tensors: what was
checked is what is used, whatever happens to the path meanwhile, and nothing but JSON is ever parsed. The safetensors
library is the second opinion of the tests, not a step of the reading.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .container import (
    DIGESTS_KEY,
    DTYPES,
    MAX_HEADER_BYTES,
    METADATA_KEY,
    CheckpointError,
    Entry,
    capped,
    digest,
    memory,
    metadata_digest,
    nonfinite,
    parse_header,
    parse_json,
    shown,
)

__all__ = ["CheckpointError", "TensorFile", "read_safetensors"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".zip")

REFUSED_PICKLE = (
    "peftk does not open {what}: loading a pickle can run any code that its author put in. If you trust the file, "
    "convert it once: safetensors.torch.save_file(torch.load(file, weights_only=True), 'adapter_model.safetensors')"
)


@dataclass(frozen=True, eq=False)
class TensorFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file, as a mapping from name to tensor.

    Attributes:
        path: the file.
        tensors: name to CPU tensor, each with memory of its own.
        metadata: the strings of the header.
        verified: True if the file carries sha256 digests of every tensor and all of them agreed; False
            if it carries none (files by other libraries), so that damage to the values cannot be seen.
    """

    path: str
    tensors: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, str]
    verified: bool

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def resolve_inside(folder: str | os.PathLike[str], name: str) -> Path:
    """The real path of the file `name` in `folder`, refusing every way out of the folder.

    A link may point inside the folder, or, in a hub cache (`<repo>/snapshots/<revision>/`), to `<repo>/blobs/`,
    because that is how the cache stores every file.

    Raises:
        CheckpointError: no such file, not a plain name, not a regular file, or a link that leaves the folder.
    """
    file = Path(folder) / name.replace("\0", "?")
    if name in ("", ".", "..") or any(letter in name for letter in "/\\\0") or name[1:2] == ":":
        raise CheckpointError(file, f"expected a plain file name, got {shown(name)}")
    try:
        root = Path(folder).resolve(strict=True)
        target = (root / name).resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(file, f"cannot be opened: {reason}") from error
    allowed = [root]
    if "snapshots" in root.parts:
        snapshots = next(parent for parent in (root, *root.parents) if parent.name == "snapshots")
        allowed.append(snapshots.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            file,
            f"is a link that leaves its folder: expected a file inside {root}, got {target}; copy the file there",
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(file, "expected a regular file, got a folder, device, pipe or socket")
    return target


@contextlib.contextmanager
def open_inside(folder: str | os.PathLike[str], name: str) -> Iterator[tuple[IO[bytes], int]]:
    """Open the regular file `name` in `folder` and give it with its size; a change meanwhile is an error."""
    file = Path(folder) / name
    target = resolve_inside(folder, name)
    # The path may have been exchanged since it was resolved: O_NOFOLLOW and a look at the open file settle it.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(target, flags), "rb", buffering=1 << 20) as stream:
            before = os.fstat(stream.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise CheckpointError(file, "expected a regular file, got a folder, device, pipe or socket")
            yield stream, before.st_size
            after = os.fstat(stream.fileno())
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror or error}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError(
            file,
            f"changed while it was read: {before.st_size} bytes before, {after.st_size} after; read it again",
        )


def _foreign(start: bytes) -> str | None:
    """What a file that is not safetensors is, by its first bytes."""
    if start.startswith(b"PK\x03\x04") or start.startswith(b"PK\x05\x06"):
        return "zip archives (torch.save writes pickles inside one)"
    if len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5:
        return "pickle files"
    return None


def _header(stream: IO[bytes], size: int, file: Path) -> tuple[list[Entry], dict[str, str]]:
    start = stream.read(8)
    try:
        length = int.from_bytes(start, "little")
        if len(start) < 8:
            raise ValueError(f"truncated: expected at least 8 bytes, got {len(start)}")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"header length expected at most {MAX_HEADER_BYTES} bytes, got {length}")
        if length > size - 8:
            raise ValueError(
                f"truncated: header of {length} bytes expected, the file holds {size - 8} after its length"
            )
        return parse_header(stream.read(length), size - 8 - length)
    except ValueError as error:
        foreign = _foreign(start)
        if foreign is not None:
            raise CheckpointError(file, REFUSED_PICKLE.format(what=foreign)) from None
        raise CheckpointError(file, f"not a valid safetensors file: {error}") from None


def header(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """The tensors and the metadata that the header of a safetensors file claims, checked as by `read_safetensors`."""
    if path.name.lower().endswith(PICKLE_SUFFIXES):
        raise CheckpointError(path, REFUSED_PICKLE.format(what=f"{path.suffix.lower()} files (pickles)"))
    with open_inside(path.parent, path.name) as (stream, size):
        return _header(stream, size, path)


def header_shapes(path: Path) -> dict[str, torch.Size]:
    """The shapes of the tensors of a safetensors file by its header, which is checked as by `read_safetensors`."""
    return {entry.name: torch.Size(entry.shape) for entry in header(path)[0]}


def _tensor(stream: IO[bytes], entry: Entry, file: Path) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.code], device="cpu")
    if tensor.numel():
        got = stream.readinto(memory(tensor))  # type: ignore[attr-defined]  # BinaryIO of typeshed has no readinto.
        if got != entry.end - entry.begin:
            raise CheckpointError(
                file,
                f"key {shown(entry.name)}: {entry.end - entry.begin} bytes expected, got {got}: truncated",
            )
    return tensor


def _value_problem(tensor: Tensor) -> str | None:
    if tensor.dtype is torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        return "bytes expected 0 or 1 for BOOL, got others"
    found = nonfinite(tensor)
    return None if found is None else f"values expected finite, got {found}"


def _digest_problems(tensors: dict[str, Tensor], metadata: dict[str, str]) -> list[str]:
    try:
        digests = parse_json(metadata[DIGESTS_KEY].encode("utf-8", "surrogatepass"), max_depth=1)
    except ValueError as error:
        return [f"metadata {DIGESTS_KEY}: {error}"]
    if digests.keys() != tensors.keys() | {METADATA_KEY}:
        odd = sorted(digests.keys() ^ (tensors.keys() | {METADATA_KEY}))
        return [
            f"metadata {DIGESTS_KEY}: digests expected for exactly the tensors of the file, differs at {shown(odd)}"
        ]
    problems = []
    if digests[METADATA_KEY] != metadata_digest(metadata):
        problems.append("metadata: sha256 does not agree with the content; the file was changed after it was saved")
    for name, tensor in tensors.items():
        got = digest(tensor)
        if digests[name] != got:
            problems.append(
                f"key {shown(name)}: sha256 expected {shown(digests[name])}, got {shown(got)}: the data was "
                f"damaged, or changed after peftk saved it (if on purpose, save without the metadata {DIGESTS_KEY})"
            )
    return capped(problems, "keys whose sha256 does not agree")


def scan_safetensors(path: str | os.PathLike[str]) -> tuple[TensorFile, list[str]]:
    """As `read_safetensors`, but problems of the values (sha256, NaN) are returned for the caller to list."""
    folder, name = os.path.split(os.fspath(path))
    file = Path(path)
    if name.lower().endswith(PICKLE_SUFFIXES):
        raise CheckpointError(file, REFUSED_PICKLE.format(what=f"{Path(name).suffix.lower()} files (pickles)"))
    with open_inside(folder or ".", name) as (stream, size):
        entries, metadata = _header(stream, size, file)
        tensors = {entry.name: _tensor(stream, entry, file) for entry in entries}
        if stream.read(1):
            raise CheckpointError(file, f"grew while it was read: expected {size} bytes; read it again")
    verified = DIGESTS_KEY in metadata
    if not verified and any("peftk" in key or f'"{METADATA_KEY}"' in value for key, value in metadata.items()):
        # Otherwise one damaged letter of that name would switch all the digests off.
        raise CheckpointError(
            file, f"metadata: {DIGESTS_KEY} expected, as peftk wrote this file, got {shown([*metadata])}"
        )
    problems = _digest_problems(tensors, metadata) if verified else []
    values = ((name, _value_problem(tensor)) for name, tensor in tensors.items())
    problems += capped(
        (f"key {shown(name)}: {problem}" for name, problem in values if problem is not None),
        "keys with bad values",
    )
    return TensorFile(os.fspath(file), tensors, metadata, verified and not problems), problems


def read_safetensors(path: str | os.PathLike[str]) -> TensorFile:
    """Read a safetensors file after checking everything that it says.

    Header: at most 100 MB, strict JSON without duplicate keys, known dtypes, tensors that lie end to end, each exactly
    as long as its shape and dtype say, and a file of exactly that size. Values: no NaN or infinity. If the metadata
    holds `peftk_sha256` (files by peftk), the sha256 of every tensor must agree.

    Args:
        path: the file; a link may lead to a file of the same folder or of the hub cache, and nowhere else.

    Returns:
        A mapping from name to CPU tensor of the dtype and shape in the file; `verified` says whether it held digests.

    Raises:
        CheckpointError: anything else, naming the file, the key, what was expected and what came. Pickles are refused
            by suffix and by content.

    Example:
        >>> file = read_safetensors("adapter/adapter_model.safetensors")  # doctest: +SKIP
        >>> file.verified, list(file)  # doctest: +SKIP
    """
    file, problems = scan_safetensors(path)
    if problems:
        raise CheckpointError(file.path, *problems)
    return file
