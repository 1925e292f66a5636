"""Files that would run code, lead elsewhere, hang or change: refused, without an import, exec or open elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.checkpoint_files import CONFIG, WEIGHTS, adapter, attempt, same, shapes_of
from torch import Tensor

from peftk.checkpoint import CheckpointError, read_adapter, read_config, read_safetensors, write_adapter

EVENTS: list[tuple[str, str]] = []
_listening = False


def _listen(event: str, arguments: tuple) -> None:
    # Wrapping an open descriptor in a file object is reported as an open too, of a number.
    if _listening and not (event == "open" and isinstance(arguments[0], int)):
        EVENTS.append((event, repr(arguments[:1])))


sys.addaudithook(_listen)


@contextlib.contextmanager
def audited() -> Iterator[list[tuple[str, str]]]:
    """What Python itself reports meanwhile: every import, exec, unpickling, process and open."""
    global _listening
    EVENTS.clear()
    _listening = True
    try:
        yield EVENTS
    finally:
        _listening = False


FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("echo peftk-was-here > /dev/null",)


def pickles() -> dict[str, bytes]:
    files = {f"protocol {protocol}": pickle.dumps(Bomb(), protocol) for protocol in range(6)}
    files |= {f"tensor {protocol}": pickle.dumps({"a": [1.0]}, protocol) for protocol in range(6)}
    for name, zipped in (("torch zip", True), ("torch legacy", False)):
        stream = io.BytesIO()
        torch.save({"a": torch.zeros(2), "bomb": Bomb()}, stream, _use_new_zipfile_serialization=zipped)
        files[name] = stream.getvalue()
    files["empty zip"] = b"PK\x05\x06" + b"\0" * 18
    files["numpy"] = b"\x93NUMPY" + b"\0" * 64
    files["hdf5"] = b"\x89HDF\r\n\x1a\n" + b"\0" * 64
    files["gzip"] = b"\x1f\x8b" + b"\0" * 64
    files["python"] = b"import os\nos.system('echo')\n"
    files["yaml"] = b"!!python/object/apply:os.system ['echo']\n"
    files["html"] = b"<!doctype html><title>404</title>"
    files["lfs pointer"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    return files


SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".zip", ".BIN", "")


def test_pickles_and_other_files_are_refused_without_running_anything(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_safetensors(tmp_path / "warm.safetensors")
    refused = 0
    for name, content in pickles().items():
        for suffix in SUFFIXES:
            file = tmp_path / f"file{suffix}"
            file.write_bytes(content)
            with audited() as events, pytest.raises(CheckpointError) as caught:
                read_safetensors(file)
            assert not [event for event in events if event[0] in FORBIDDEN], (name, suffix)
            assert all(str(tmp_path) in opened for event, opened in events if event == "open"), (name, suffix)
            assert str(file) in str(caught.value)
            if suffix not in (".safetensors", "") or name.startswith(("torch zip", "empty zip", "protocol 4")):
                assert "safetensors.torch.save_file" in str(caught.value), (name, suffix)
            refused += 1
    assert refused >= 200


def test_a_good_file_is_read_without_running_anything(tmp_path: Path) -> None:
    tensors = adapter()
    write_adapter(tmp_path, tensors, {"auto_mapping": {"parent_library": "this", "base_model_class": "antigravity"}})
    read_adapter(tmp_path, shapes_of(tensors))
    with audited() as events:
        read_config(tmp_path)
        read_adapter(tmp_path, shapes_of(tensors))
    assert not [event for event in events if event[0] in FORBIDDEN]
    opened = [path for event, path in events if event == "open"]
    assert len(opened) == 2 and all(str(tmp_path) in path for path in opened)


def test_adapter_that_is_only_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with audited() as events, pytest.raises(CheckpointError, match=r"adapter_model\.bin: .* pickle.*convert it once"):
        read_adapter(tmp_path, {})
    assert not [event for event in events if event[0] in FORBIDDEN]
    # Only the folder, whose lock says whether a save is running that would bring the missing file.
    assert {opened for event, opened in events if event == "open"} <= {str((str(tmp_path),))}


@pytest.fixture
def fenced(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder, beside a good adapter that is not to be reached from it."""
    write_adapter(tmp_path / "outside", adapter(), {})
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside", adapter()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_links_that_leave_the_folder_are_refused(fenced: tuple[Path, dict[str, Tensor]], name: str) -> None:
    inside, tensors = fenced
    outside = inside.parent / "outside"
    (inside / "way").symlink_to(outside, target_is_directory=True)
    for target in (
        outside / name,
        Path("..") / "outside" / name,
        Path("way") / name,
        Path("/dev/zero"),
        Path("/etc/passwd"),
    ):
        (inside / name).unlink(missing_ok=True)
        (inside / name).symlink_to(target)
        with audited() as events, pytest.raises(CheckpointError, match="is a link that leaves its folder"):
            read_adapter(inside, shapes_of(tensors)) if name == WEIGHTS else read_config(inside)
        assert not [event for event in events if event[0] == "open"]


def test_links_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    for target in (WEIGHTS, "gone", "gone/" + WEIGHTS):
        (tmp_path / WEIGHTS).unlink(missing_ok=True)
        (tmp_path / WEIGHTS).symlink_to(target)
        with pytest.raises(CheckpointError, match="cannot be opened"):
            read_adapter(tmp_path, {})


def test_links_inside_the_folder_and_in_a_hub_cache_are_followed(tmp_path: Path) -> None:
    tensors = adapter()
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "0123abcd", tmp_path / "models--x--y" / "blobs"
    blobs.mkdir(parents=True)
    write_adapter(snapshot, tensors, {"r": 4})
    for name in (WEIGHTS, CONFIG):
        os.replace(snapshot / name, blobs / name[:7])
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name[:7])
        # The first seven letters of both names agree.
        if name == WEIGHTS:
            os.replace(blobs / name[:7], blobs / "weights")
            (snapshot / name).unlink()
            (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / "weights")
    assert read_config(snapshot) == {"r": 4}
    assert same(read_adapter(snapshot, shapes_of(tensors)), tensors)
    (tmp_path / "alias").symlink_to(snapshot, target_is_directory=True)
    assert same(read_adapter(tmp_path / "alias", shapes_of(tensors)), tensors)

    write_adapter(tmp_path / "flat", tensors, {})
    os.replace(tmp_path / "flat" / WEIGHTS, tmp_path / "flat" / "real.safetensors")
    (tmp_path / "flat" / WEIGHTS).symlink_to("real.safetensors")
    assert same(read_adapter(tmp_path / "flat", shapes_of(tensors)), tensors)


NAMES = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "..\\x",
    "\\\\server\\share",
    "C:x",
    "C:\\x",
    "a\0b",
    "\0",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_not_plain(tmp_path: Path, name: str) -> None:
    from peftk.checkpoint.reader import open_inside, resolve_inside

    with audited() as events:
        with pytest.raises(CheckpointError, match="expected a plain file name"):
            resolve_inside(tmp_path, name)
        with pytest.raises(CheckpointError, match="expected a plain file name"), open_inside(tmp_path, name):
            pass
    assert not [event for event in events if event[0] == "open"]


def test_a_nul_in_a_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="plain file name"):
        read_safetensors(f"{tmp_path}/a\0.safetensors")
    with pytest.raises(ValueError, match="folder: expected a path"):
        read_config(f"{tmp_path}\0")


def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)
        try:
            server.bind("socket.safetensors")
        finally:
            os.chdir(here)
        for name in ("folder", "pipe", "socket"):
            with pytest.raises(CheckpointError, match="expected a regular file"):
                read_safetensors(tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        read_safetensors("/dev/zero")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftk.checkpoint import reader

    file, parse = tmp_path / "t.safetensors", reader.parse_header
    for change in ("grow", "shrink", "rewrite"):
        content = safetensors.torch.save({"a": torch.ones(1 << 20)})
        file.write_bytes(content)

        def meddle(raw: bytes, size: int, change: str = change, content: bytes = content) -> object:
            with open(file, "r+b") as stream:
                if change == "grow":
                    stream.seek(0, 2)
                    stream.write(b"\0" * 64)
                elif change == "shrink":
                    stream.truncate(len(content) // 2)
                else:
                    stream.write(content[:8])
            os.utime(file, ns=(1, 1))
            return parse(raw, size)

        with monkeypatch.context() as patch:
            patch.setattr(reader, "parse_header", meddle)
            with pytest.raises(CheckpointError, match=r"changed while it was read|grew|truncated"):
                read_safetensors(file)
        assert attempt(file, content) is not None
