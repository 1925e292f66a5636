"""What the safetensors reader and writer share: the error, strict JSON, dtypes, digests, the header's rules."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000
DIGESTS_KEY = "peftk_sha256"
CONFIG_DIGEST_KEY = "peftk_config_sha256"
METADATA_KEY = "__metadata__"
UNCOVERED_FIELDS = ("base_model_name_or_path", "inference_mode", "revision")
LISTED = 8

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted or does not fit: names the file and, for every problem, key, expected, got.

    Args:
        file: the file or folder at fault.
        *problems: one sentence each.

    Attributes:
        file: the same, as a string.
        problems: the same, as a tuple.

    Example:
        >>> str(CheckpointError("a.safetensors", "key 'w': shape expected (2, 3), got (3, 2)"))
        "a.safetensors: key 'w': shape expected (2, 3), got (3, 2)"
    """

    def __init__(self, file: str | os.PathLike[str], *problems: str):
        super().__init__(os.fspath(file), *problems)
        self.file = os.fspath(file)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.file}: {self.problems[0]}"
        return f"{self.file}: several problems\n  " + "\n  ".join(self.problems)


class Entry(NamedTuple):
    """One tensor of a header: its name, dtype code, shape and byte range in the payload."""

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


def shown(value: Any) -> str:
    """`repr` cut to a length that cannot flood a message; file contents reach messages only through here."""
    text = repr(value)
    return text if len(text) <= 160 else text[:120] + f"... ({len(text)} characters)"


def capped(problems: Iterable[str], rest: str) -> list[str]:
    """The first `LISTED` problems and, if there are more, one line that counts them: "and 5 more {rest}"."""
    problems = list(problems)
    if len(problems) <= LISTED + 1:
        return problems
    return [*problems[:LISTED], f"and {len(problems) - LISTED} more {rest}"]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {shown(name)} occurs twice in one JSON object")
            seen.add(name)
    return result


def _integer(text: str) -> int:
    # Parsing is quadratic in the digits, and nothing in an adapter needs more than 64 bits.
    if len(text) > 40:
        raise ValueError(f"JSON integer of {len(text)} digits; expected at most 40")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"JSON number {shown(text)} is too large for a float")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"JSON holds {text}; expected finite numbers")


def parse_json(raw: bytes, *, max_depth: int) -> dict[str, Any]:
    """The JSON object in `raw`, strictly: UTF-8, no duplicate keys, no NaN or Infinity, limited nesting.

    Raises:
        ValueError: with a sentence that says what is wrong; the caller adds the file.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"JSON is not UTF-8: {error.reason} at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise ValueError("JSON begins with a byte order mark; expected plain UTF-8")
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_number, parse_constant=_constant
        )
    except RecursionError:
        raise ValueError(f"JSON is nested too deeply; expected at most {max_depth} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(max_depth):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return value
    raise ValueError(f"JSON is nested too deeply; expected at most {max_depth} levels")


def name_problem(name: str) -> str | None:
    """Why `name` cannot be a tensor's name, or None."""
    if not name or name == METADATA_KEY:
        return f"{shown(name)} is not a tensor name"
    if not name.isprintable():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            return f"{shown(name)} is not valid Unicode"
        if any(ord(character) < 32 or ord(character) == 127 for character in name):
            return f"{shown(name)} holds control characters"
    return None


def _entry(name: str, fields: Any) -> Entry:
    problem = name_problem(name)
    if problem is not None:
        raise ValueError(f"key {problem}")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"key {shown(name)}: expected an object of dtype, shape and data_offsets, got {shown(fields)}")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"key {shown(name)}: dtype expected one of {', '.join(DTYPES)}, got {shown(code)}")
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        # `type is int`, because JSON's true is an int to isinstance.
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(
                f"key {shown(name)}: {field} expected a list of integers in [0, 2^63), got {shown(numbers)}"
            )
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(
            f"key {shown(name)}: data_offsets expected [begin, end] with begin <= end, got {shown(offsets)}"
        )
    # A zero makes the product small, but torch multiplies the other sizes and overflows.
    if len(shape) > 16 or math.prod(n for n in shape if n) >= 1 << 63:
        raise ValueError(f"key {shown(name)}: shape expected at most 16 sizes and 2^63 elements, got {shown(shape)}")
    size = math.prod(shape) * DTYPES[code].itemsize
    if offsets[1] - offsets[0] != size:
        raise ValueError(
            f"key {shown(name)}: {code} of shape {shape} takes {size} bytes, "
            f"data_offsets {offsets} span {offsets[1] - offsets[0]}"
        )
    return Entry(name, code, tuple(shape), offsets[0], offsets[1])


def parse_header(raw: bytes, payload_size: int) -> tuple[list[Entry], dict[str, str]]:
    """Tensors in payload order, and metadata, of a safetensors header whose every claim has been checked.

    Raises:
        ValueError: with a sentence that names the key, what was expected and what came.
    """
    if raw[:1] != b"{":
        raise ValueError("header expected to begin with '{'")
    fields = parse_json(raw, max_depth=3)
    metadata = fields.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA_KEY} expected an object of strings, got {shown(metadata)}")
    entries = [_entry(name, value) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    cursor = 0
    for entry in entries:
        if entry.begin != cursor:
            what = "overlaps the tensor before it" if entry.begin < cursor else "leaves a hole before it"
            raise ValueError(
                f"key {shown(entry.name)}: {what}: data expected to begin at byte {cursor}, got {entry.begin}"
            )
        cursor = entry.end
    if cursor != payload_size:
        raise ValueError(f"tensors take {cursor} bytes, the file holds {payload_size} after its header")
    return entries, metadata


def memory(tensor: Tensor) -> ctypes.Array[ctypes.c_ubyte]:
    """The bytes of a contiguous CPU tensor as a writable buffer, without a copy and without numpy."""
    if sys.byteorder != "little":
        raise RuntimeError("safetensors files are little-endian; this machine is not")
    return (ctypes.c_ubyte * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())


def digest(tensor: Tensor) -> str:
    """sha256 of the line `F32 [2, 3]` (dtype code, shape), a newline, and the bytes of the tensor in the file.

    Dtype and shape are part of it because the bytes alone do not tell (2, 3) from (3, 2).
    """
    sha = hashlib.sha256(f"{CODES[tensor.dtype]} {list(tensor.shape)}\n".encode())
    if tensor.numel():
        sha.update(memory(tensor))
    return sha.hexdigest()


def metadata_digest(metadata: dict[str, str]) -> str:
    """sha256 of the metadata, without the digests themselves, as JSON with sorted keys and no spaces."""
    rest = {name: value for name, value in metadata.items() if name != DIGESTS_KEY}
    return hashlib.sha256(
        json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    ).hexdigest()


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration as JSON with sorted fields and no spaces, so that it can be laid out anew.

    What is in the fields is not sorted: of several patterns the first one counts. Fields that say where files lie, or
    that loading sets itself, are left out, because they change with the machine and not with the adapter.
    """
    covered = {name: value for name, value in config.items() if name not in UNCOVERED_FIELDS}
    experts = covered.get("adapters")
    if isinstance(experts, Mapping):
        # X-LoRA: which experts there are, not their folders.
        covered["adapters"] = list(experts)
    text = json.dumps(dict(sorted(covered.items())), separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def nonfinite(tensor: Tensor) -> str | None:
    """How many NaN and infinities a tensor of any dtype holds, as words, or None."""
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex) or not tensor.numel():
        return None
    tensor = tensor.detach()
    # Neither can leave a sum, so a finite sum settles it in one pass and without a temporary; an infinite one
    # may be an overflow of finite values. One-byte floats have no sum.
    if tensor.element_size() > 1 and bool(torch.isfinite(tensor.sum())):
        return None
    nan = inf = 0
    for chunk in tensor.reshape(-1).split(1 << 20):
        values = chunk.float() if chunk.element_size() == 1 else chunk
        nan += int(torch.isnan(values).sum())
        inf += int((~torch.isfinite(values)).sum())
    return f"{nan} NaN and {inf - nan} infinite of {tensor.numel()} values" if inf else None
