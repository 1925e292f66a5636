"""Damaged, lying and hostile files: each is refused with an error that names it, or is read as what it was."""

from __future__ import annotations

import contextlib
import json
import math
import random
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.checkpoint_files import (
    WEIGHTS,
    adapter,
    attempt,
    container,
    header_end,
    overwrite,
    same,
    shapes_of,
    tensor,
)
from torch import Tensor

from peftk.checkpoint import CheckpointError, read_adapter, read_safetensors, write_adapter


@pytest.fixture
def ours(tmp_path: Path) -> tuple[dict[str, Tensor], bytes]:
    tensors = {**adapter(), "n": torch.tensor([1.0, -2.0, 0.5]).bfloat16()}
    write_adapter(tmp_path / "ours", tensors, {})
    return tensors, (tmp_path / "ours" / WEIGHTS).read_bytes()


@pytest.fixture
def theirs() -> tuple[dict[str, Tensor], bytes]:
    tensors = {**adapter(), "n": torch.tensor([1.0, -2.0, 0.5]).bfloat16(), "i": torch.arange(3)}
    return tensors, safetensors.torch.save(tensors, {"format": "pt"})


# Damage


@pytest.mark.parametrize("source", ["ours", "theirs"])
def test_every_truncation_and_extension_is_refused(tmp_path: Path, request: pytest.FixtureRequest, source: str) -> None:
    _, content = request.getfixturevalue(source)
    for length in range(len(content)):
        assert attempt(tmp_path / "t.safetensors", content[:length]) is None, length
    for tail in (b"\0", b" ", b"\n", content, b"\0" * 4096):
        assert attempt(tmp_path / "t.safetensors", content + tail) is None
    assert attempt(tmp_path / "t.safetensors", content) is not None


def test_single_bits_of_a_file_by_peftk(tmp_path: Path, ours: tuple[dict[str, Tensor], bytes]) -> None:
    tensors, content = ours
    end = 8 * header_end(content)
    assert end > 2000 and len(content) * 8 - end > 1000
    bits = random.Random(3).sample(range(end), 2000) + random.Random(4).sample(range(end, len(content) * 8), 1000)
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        assert attempt(tmp_path / "t.safetensors", bytes(flipped)) is None, bit
    assert same(dict(attempt(tmp_path / "t.safetensors", content) or {}), tensors)


def test_every_bit_of_the_name_of_the_digests(tmp_path: Path, ours: tuple[dict[str, Tensor], bytes]) -> None:
    _, content = ours
    at = content.index(b"peftk_sha256")
    for bit in range(8 * at, 8 * (at + len(b"peftk_sha256"))):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        assert attempt(tmp_path / "t.safetensors", bytes(flipped)) is None, bit


def test_random_damage_to_a_file_by_peftk(tmp_path: Path, ours: tuple[dict[str, Tensor], bytes]) -> None:
    tensors, content = ours
    rng = random.Random(0)
    for case in range(2500):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            match rng.randrange(5):
                case 0:
                    damaged[at] = rng.randrange(256)
                case 1:
                    del damaged[at : at + rng.randint(1, 16)]
                case 2:
                    damaged[at:at] = rng.randbytes(rng.randint(1, 16))
                case 3:
                    size = rng.randint(1, 32)
                    other = rng.randrange(len(damaged))
                    damaged[at : at + size], damaged[other : other + size] = (
                        damaged[other : other + size],
                        damaged[at : at + size],
                    )
                case 4:
                    damaged[at : at + 4] = bytes(4)
        file = attempt(tmp_path / "t.safetensors", bytes(damaged))
        assert file is None or same(dict(file), tensors), case


def test_accepted_header_flips_of_other_files_are_what_the_safetensors_library_reads(
    tmp_path: Path, theirs: tuple[dict[str, Tensor], bytes]
) -> None:
    _, content = theirs
    rng = random.Random(1)
    accepted = 0
    for _ in range(2000):
        flipped = bytearray(content)
        flipped[rng.randrange(header_end(content))] ^= 1 << rng.randrange(8)
        file = attempt(tmp_path / "t.safetensors", bytes(flipped))
        if file is not None:
            accepted += 1
            assert not file.verified
            assert same(dict(file), safetensors.torch.load(bytes(flipped)))
    # Without digests a renamed key is as good as any other: `read_adapter` refuses it by name.
    assert 0 < accepted < 500


def test_header_flips_of_other_files_never_reach_a_model(
    tmp_path: Path, theirs: tuple[dict[str, Tensor], bytes]
) -> None:
    tensors, content = theirs
    tensors = {name: value for name, value in tensors.items() if value.dtype.is_floating_point}
    content = safetensors.torch.save(tensors, {"format": "pt"})
    rng = random.Random(2)
    for case in range(2000):
        flipped = bytearray(content)
        flipped[rng.randrange(header_end(content))] ^= 1 << rng.randrange(8)
        overwrite(tmp_path / WEIGHTS, bytes(flipped))
        with contextlib.suppress(CheckpointError):
            assert same(read_adapter(tmp_path, shapes_of(tensors)), tensors), case


def test_digests_that_do_not_cover_the_file(tmp_path: Path, ours: tuple[dict[str, Tensor], bytes]) -> None:
    _, content = ours
    header = json.loads(content[8 : header_end(content)])
    payload = content[header_end(content) :]
    digests = json.loads(header["__metadata__"]["peftk_sha256"])
    first = next(name for name in digests if name != "__metadata__")
    changed = {
        "missing": {name: value for name, value in digests.items() if name != first},
        "extra": {**digests, "x": "0" * 64},
        "wrong": {**digests, first: "0" * 64},
        "not a string": {**digests, first: 3},
        "none": {},
        "uncovered metadata": {name: value for name, value in digests.items() if name != "__metadata__"},
    }
    texts = {name: json.dumps(value) for name, value in changed.items()}
    texts |= {"empty": "", "list": "[]", "deep": "[" * 5000, "twice": '{"a":1,"a":1}'}
    for name, text in texts.items():
        header["__metadata__"]["peftk_sha256"] = text
        (tmp_path / "t.safetensors").write_bytes(container(header, payload))
        with pytest.raises(CheckpointError, match="sha256"):
            read_safetensors(tmp_path / "t.safetensors")
            pytest.fail(name)
    header["__metadata__"] |= {"peftk_sha256": json.dumps(digests), "format": "tf"}
    assert attempt(tmp_path / "t.safetensors", container(header, payload)) is None


def test_digests_cover_shape_and_dtype(tmp_path: Path, ours: tuple[dict[str, Tensor], bytes]) -> None:
    _, content = ours
    end = header_end(content)
    for key, field, value in (("base_model.model.fc.lora_A.weight", "shape", [6, 4]), ("n", "dtype", "F16")):
        header = json.loads(content[8:end])
        header[key][field] = value
        (tmp_path / "t.safetensors").write_bytes(container(header, content[end:]))
        with pytest.raises(CheckpointError, match=f"key '{key}': sha256 expected"):
            read_safetensors(tmp_path / "t.safetensors")


def test_a_damaged_value_names_its_key(tmp_path: Path, ours: tuple[dict[str, Tensor], bytes]) -> None:
    tensors, content = ours
    end = header_end(content)
    for name, entry in json.loads(content[8:end]).items():
        if name == "__metadata__":
            continue
        damaged = bytearray(content)
        damaged[end + entry["data_offsets"][0]] ^= 1
        (tmp_path / WEIGHTS).write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match=rf"key '{name}': sha256 expected '[0-9a-f]{{64}}', got"):
            read_adapter(tmp_path, shapes_of(tensors))


# Lies


F = tensor("F32", [1], 0, 4)
BYTE = b'{"dtype":"U8","shape":[],"data_offsets":[0,1]}'
LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "no header": (container(b""), "begin with"),
    "length over cap": (container({}, length=100_000_001), "at most 100000000"),
    "length 2^63": (container({}, length=1 << 63), "at most 100000000"),
    "length 2^64-1": (container({}, length=(1 << 64) - 1), "at most 100000000"),
    "length beyond file": (container({}, length=50), "truncated"),
    "length short": (container({"a": F}, b"\0" * 4, length=20), "JSON"),
    "leading space": (container(b" {}"), "begin with"),
    "byte order mark": (container(b"\xef\xbb\xbf{}"), "begin with"),
    "list": (container(b"[]"), "begin with"),
    "not utf-8": (container(b'{"\xff": 1}'), "not UTF-8"),
    "two objects": (container(b"{}{}"), "not valid JSON"),
    "nan": (container(b'{"__metadata__": NaN}'), "NaN"),
    "duplicate key": (
        container(
            b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[],"data_offsets":[0,1]}}',
            b"\1",
        ),
        "'a' occurs twice",
    ),
    "duplicate metadata": (container(b'{"__metadata__":{},"__metadata__":{}}'), "occurs twice"),
    "duplicate field": (
        container(b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', b""),
        "twice",
    ),
    "duplicate by escape": (
        container(
            b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"\\u0061":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
            b"\1",
        ),
        "occurs twice",
    ),
    "metadata list": (container({"__metadata__": []}), "object of strings"),
    "metadata number": (container({"__metadata__": {"a": 1}}), "object of strings"),
    "entry number": (container({"a": 1}), "expected an object of dtype"),
    "entry lacks shape": (container({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "expected an object of dtype"),
    "entry has more": (container({"a": {**F, "code": "import os"}}, b"\0" * 4), "expected an object of dtype"),
    "dtype unknown": (container({"a": tensor("F33", [1], 0, 4)}, b"\0" * 4), "'a': dtype expected one of"),
    "dtype number": (container({"a": tensor(3, [1], 0, 4)}, b"\0" * 4), "dtype expected one of"),
    "dtype list": (container({"a": tensor(["F32"], [1], 0, 4)}, b"\0" * 4), "dtype expected one of"),
    "dtype lower case": (container({"a": tensor("f32", [1], 0, 4)}, b"\0" * 4), "dtype expected one of"),
    "shape true": (container({"a": tensor("U8", [True], 0, 1)}, b"\0"), "shape expected a list of integers"),
    "shape float": (container({"a": tensor("U8", [1.0], 0, 1)}, b"\0"), "shape expected a list of integers"),
    "shape negative": (container({"a": tensor("U8", [-1, -1], 0, 1)}, b"\0"), "shape expected a list of integers"),
    "shape string": (container({"a": tensor("U8", "1", 0, 1)}, b"\0"), "shape expected a list of integers"),
    "shape null": (container({"a": tensor("U8", None, 0, 1)}, b"\0"), "shape expected a list of integers"),
    "shape 2^64": (container({"a": tensor("U8", [1 << 64, 0], 0, 0)}), "shape expected a list of integers"),
    "shape of 10^6 digits": (
        container(b'{"a":{"shape":[' + b"9" * 10**6 + b"]}}"),
        "digits",
    ),
    "too many sizes": (container({"a": tensor("U8", [1] * 17, 0, 1)}, b"\0"), "at most 16 sizes"),
    "zero-size overflow": (container({"a": tensor("U8", [1 << 62, 1 << 62, 0], 0, 0)}), "2\\^63 elements"),
    "zero-size overflow first": (container({"a": tensor("F64", [0, 1 << 62, 4], 0, 0)}), "2\\^63 elements"),
    "product wraps to 0": (container({"a": tensor("U8", [1 << 32, 1 << 32], 0, 0)}), "2\\^63 elements"),
    "product wraps to 4": (container({"a": tensor("F32", [(1 << 62) + 1], 0, 4)}, b"\0" * 4), "takes"),
    "shape too long": (container({"a": tensor("F32", [2], 0, 4)}, b"\0" * 4), "takes 8 bytes"),
    "shape too short": (container({"a": tensor("F32", [1], 0, 8)}, b"\0" * 8), "takes 4 bytes"),
    "huge but absent": (container({"a": tensor("F32", [1 << 40], 0, 1 << 42)}), "the file holds 0"),
    "offsets three": (container({"a": {**F, "data_offsets": [0, 4, 8]}}, b"\0" * 4), "data_offsets expected"),
    "offsets backwards": (container({"a": tensor("F32", [1], 4, 0)}, b"\0" * 4), "begin <= end"),
    "offsets negative": (container({"a": tensor("F32", [1], -4, 0)}, b"\0" * 4), "list of integers"),
    "offsets minus zero": (container(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}}', b"\1"), "integers"),
    "overlap whole": (container({"a": F, "b": F}, b"\0" * 4), "overlaps"),
    "overlap part": (
        container({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)}, b"\0" * 3),
        "overlaps",
    ),
    "overlap inside": (container({"a": tensor("U8", [8], 0, 8), "b": tensor("U8", [2], 2, 4)}, b"\0" * 8), "overlaps"),
    "hole": (container({"a": F, "b": tensor("F32", [1], 8, 12)}, b"\0" * 12), "hole"),
    "hole at the start": (container({"a": tensor("F32", [1], 4, 8)}, b"\0" * 8), "hole"),
    "empty tensor inside": (container({"a": F, "b": tensor("F32", [0], 2, 2)}, b"\0" * 4), "overlaps"),
    "empty tensor beyond": (container({"a": F, "b": tensor("F32", [0], 8, 8)}, b"\0" * 4), "hole"),
    "tail": (container({"a": F}, b"\0" * 5), "the file holds 5"),
    "payload without tensors": (container({}, b"\0"), "the file holds 1"),
    "name empty": (container({"": F}, b"\0" * 4), "not a tensor name"),
    "name nul": (container({"a\0b": F}, b"\0" * 4), "control"),
    "name surrogate": (container(b'{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"\1"), "Unicode"),
    "bool of 2": (container({"a": tensor("BOOL", [2], 0, 2)}, b"\1\2"), "'a': bytes expected 0 or 1"),
    "deep": (container(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "nested too deeply"),
    "deep lists": (container(b'{"a":' + b"[" * 1_000_000), "nested too deeply"),
    "deep shape": (container(b'{"a":{"dtype":"U8","shape":[[1]],"data_offsets":[0,1]}}', b"\1"), "nested too deeply"),
}


@pytest.mark.parametrize("case", LIES)
def test_lies(tmp_path: Path, case: str) -> None:
    content, message = LIES[case]
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(tmp_path / "t.safetensors")
    assert str(caught.value).startswith(str(tmp_path / "t.safetensors"))
    assert len(str(caught.value)) < 1000


CHECKED = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", CHECKED, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    bad = torch.zeros(5, 5, dtype=dtype)
    bad[2, 3] = value
    safetensors.torch.save_file({"good": torch.ones(2), "bad": bad}, tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match=r"key 'bad': values expected finite, got .* of 25 values"):
        read_safetensors(tmp_path / "t.safetensors")


def test_opposite_infinities_do_not_cancel(tmp_path: Path) -> None:
    safetensors.torch.save_file({"bad": torch.tensor([math.inf, -math.inf])}, tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match="0 NaN and 2 infinite of 2"):
        read_safetensors(tmp_path / "t.safetensors")


def test_what_is_legal_is_read(tmp_path: Path) -> None:
    legal = {
        "nothing": container({}),
        "padding": container(b"{}" + b" " * 6),
        "empty tensors": container(
            {"a": tensor("F32", [0, 5], 0, 0), "b": F, "c": tensor("F64", [3, 0], 4, 4)}, b"\0" * 4
        ),
        "reversed": container({"b": tensor("U8", [2], 2, 4), "a": tensor("U8", [2], 0, 2)}, b"\1\2\3\4"),
        "unaligned": container(
            {"a": tensor("U8", [1], 0, 1), "b": tensor("F64", [1], 1, 9)}, b"\1" + struct.pack("<d", 1.5)
        ),
        "unicode": container({"ключ.键": F}, b"\0" * 4),
        "scalar": container({"a": tensor("F16", [], 0, 2)}, b"\0\0"),
    }
    for name, content in legal.items():
        file = attempt(tmp_path / "t.safetensors", content)
        assert file is not None, name
        assert same(dict(file), safetensors.torch.load(content)), name


def test_a_hundred_thousand_keys(tmp_path: Path) -> None:
    names = [f"base_model.model.layers.{i}.lora_A.weight" for i in range(100_000)]
    header = {name: tensor("F16", [1], 2 * i, 2 * i + 2) for i, name in enumerate(names)}
    (tmp_path / WEIGHTS).write_bytes(container(header, bytes(200_000)))
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="and 99991 more unexpected keys"):
        read_adapter(tmp_path, {names[0]: (1,)})
    assert time.process_time() - begin < 20


def test_memory_is_that_of_the_tensors(tmp_path: Path) -> None:
    size = 1 << 22
    safetensors.torch.save_file({"a": torch.ones(size // 4), "b": torch.ones(size // 4)}, tmp_path / "t.safetensors")
    tracemalloc.start()
    try:
        read_safetensors(tmp_path / "t.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Tensors lie outside Python's memory: a copy of the file as bytes would show here.
    assert peak < size
