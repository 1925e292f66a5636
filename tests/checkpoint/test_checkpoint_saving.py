"""A save that cannot succeed, fails or is killed leaves the old pair whole, and never a mixed one."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import CONFIG, WEIGHTS, adapter, assert_holds, hidden, same, shapes_of

from peftk.checkpoint import CheckpointError, read_adapter, read_config, write_adapter, writer

# What cannot be saved is refused before anything is written


def bad_tensors() -> dict[str, tuple[object, type[Exception], str]]:
    shared = torch.randn(8, 4)
    nan, inf = torch.randn(3, 3), torch.randn(3, 3)
    nan[1, 2], inf[0, 0] = math.nan, -math.inf
    return {
        "list": ([torch.zeros(1)], TypeError, "expected a dict"),
        "none": ({}, ValueError, "at least one"),
        "number name": ({1: torch.zeros(1)}, TypeError, "names that are strings, got 1"),
        "not a tensor": ({"k": [1.0]}, TypeError, "'k': expected a tensor, got list"),
        "empty name": ({"": torch.zeros(1)}, ValueError, "''"),
        "metadata name": ({"__metadata__": torch.zeros(1)}, ValueError, "__metadata__"),
        "control name": ({"a\0b": torch.zeros(1)}, ValueError, "control"),
        "surrogate name": ({"a\ud800": torch.zeros(1)}, ValueError, "Unicode"),
        "same": ({"k": shared, "m": shared}, ValueError, "'k' and 'm'.*share"),
        "view": ({"k": shared, "m": shared[3]}, ValueError, "'k' and 'm'.*share"),
        "rows": ({"k": shared[:5], "m": shared[4:]}, ValueError, "share"),
        "nan": ({"ok": torch.zeros(1), "k": nan}, ValueError, "'k'.*1 NaN and 0 infinite of 9"),
        "inf": ({"k": inf}, ValueError, "'k'.*0 NaN and 1 infinite of 9"),
        "nan half": ({"k": nan.bfloat16(), "m": inf.half()}, ValueError, "'k'.*NaN.*'m'.*1 infinite"),
        "nan fp8": ({"k": nan.to(torch.float8_e4m3fn)}, ValueError, "'k'.*1 NaN"),
        "complex": ({"k": torch.zeros(2, dtype=torch.complex64)}, ValueError, "'k': dtype expected floating"),
        "complex128": ({"k": torch.zeros(2, dtype=torch.complex128)}, ValueError, "'k': dtype expected one of"),
        "sparse": ({"k": torch.eye(3).to_sparse()}, ValueError, "'k': expected a dense tensor"),
        "meta": ({"k": torch.zeros(2, device="meta")}, ValueError, "'k': expected a dense tensor.*meta"),
        "shard": ({"k": torch.zeros(0)}, ValueError, "'k': shape expected with elements.*gather"),
        "many": ({f"k{i}": nan.clone() for i in range(50)}, ValueError, "and 42 more keys"),
    }


BAD_CONFIGS: dict[str, tuple[object, type[Exception], str]] = {
    "list": ([1], TypeError, "config: expected a dict"),
    "nan": ({"lora_alpha": math.nan}, ValueError, "lora_alpha.*finite"),
    "inf": ({"a": {"b": [1.0, math.inf]}}, ValueError, r"\['a'\]\['b'\]\[1\]"),
    "set": ({"target_modules": {"fc"}}, TypeError, "target_modules.*set"),
    "int key": ({"rank_pattern": {3: 4}}, TypeError, "rank_pattern.*3"),
    "object": ({"a": object()}, TypeError, "object"),
    "huge integer": ({"a": 10**60}, ValueError, "digits"),
    "large": ({"a": "x" * 1_000_001}, ValueError, "1000000 bytes"),
}


@pytest.mark.parametrize("case", bad_tensors())
def test_bad_tensors_leave_the_old_file(tmp_path: Path, case: str) -> None:
    tensors, kind, message = bad_tensors()[case]
    write_adapter(tmp_path, adapter(), {"old": True})
    with pytest.raises(kind, match=message):
        write_adapter(tmp_path, tensors, {"old": False})  # type: ignore[arg-type]
    assert_holds(tmp_path, adapter(), {"old": True})
    assert hidden(tmp_path) == []
    with pytest.raises(kind):
        write_adapter(tmp_path / "untouched", tensors, {})  # type: ignore[arg-type]
    assert not (tmp_path / "untouched").exists()


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_leaves_the_old_file(tmp_path: Path, case: str) -> None:
    config, kind, message = BAD_CONFIGS[case]
    write_adapter(tmp_path, adapter(), {"old": True})
    with pytest.raises(kind, match=message):
        write_adapter(tmp_path, adapter(1), config)  # type: ignore[arg-type]
    assert_holds(tmp_path, adapter(), {"old": True})


def test_deep_config_is_refused_on_both_sides(tmp_path: Path) -> None:
    deep: dict = {}
    for _ in range(40):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="nested deeper"):
        write_adapter(tmp_path, adapter(), deep)
    (tmp_path / CONFIG).write_text(json.dumps(deep))
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_config(tmp_path)


def test_disjoint_parts_of_one_storage_may_be_saved(tmp_path: Path) -> None:
    fused = torch.randn(8, 4)
    tensors = {"q": fused[:4], "k": fused[4:]}
    write_adapter(tmp_path, tensors, {})
    assert same(read_adapter(tmp_path, shapes_of(tensors)), tensors)


def test_large_finite_values_are_not_mistaken_for_infinity(tmp_path: Path) -> None:
    tensors = {"half": torch.full((64,), 65504.0).half(), "single": torch.full((64,), 3e38)}
    write_adapter(tmp_path, tensors, {})
    assert same(read_adapter(tmp_path, shapes_of(tensors)), tensors)


@pytest.mark.parametrize("folder", [3, None, b"x"])
def test_folder_must_be_a_path(folder: object) -> None:
    for call in (lambda: write_adapter(folder, adapter(), {}), lambda: read_config(folder)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="folder: expected a path"):
            call()


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="expected a folder or nothing"):
        write_adapter(tmp_path / "file", adapter(), {})
    with pytest.raises(CheckpointError, match=r"expected an existing folder.*got a file"):
        read_config(tmp_path / "file")


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(ValueError, match=f"{CONFIG}: expected a file or nothing"):
        write_adapter(tmp_path, adapter(), {})
    assert os.listdir(tmp_path) == [CONFIG]


# A save that fails leaves the old pair whole


def fail_at(function: Callable, call: int, always: bool) -> Callable:
    count = 0

    def wrapped(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == call or (always and count > call):
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    return wrapped


def successful_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> int:
    folder, count = tmp_path / "count", 0
    write_adapter(folder, adapter(), {})
    original = getattr(owner, name)

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counting)
        write_adapter(folder, adapter(1), {})
    return count


STEPS = {"rename": (os, "replace"), "sync": (os, "fsync"), "open": (os, "fdopen"), "digest": (writer, "digest")}


@pytest.mark.parametrize("first", [False, True], ids=["over an old pair", "first save"])
@pytest.mark.parametrize("step", STEPS)
def test_failure_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, first: bool) -> None:
    owner, name = STEPS[step]
    calls = successful_calls(tmp_path, monkeypatch, owner, name)
    assert calls >= 2
    failures = 0
    for call in range(1, calls + 1):
        folder = tmp_path / f"{call}"
        if not first:
            write_adapter(folder, adapter(), {"generation": 0})
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail_at(getattr(owner, name), call, always=False))
            try:
                write_adapter(folder, adapter(1), {"generation": 1})
            except OSError as error:
                assert "No space left" in str(error)
                failures += 1
                expected = None if first else 0
            else:
                expected = 1
        assert hidden(folder) == []
        if expected is None:
            assert os.listdir(folder) == []
        else:
            assert_holds(folder, adapter(expected), {"generation": expected})
        write_adapter(folder, adapter(2), {"generation": 2})
        assert_holds(folder, adapter(2), {"generation": 2})
    # Only the sync of the folder after the last rename may fail without failing the save.
    assert failures >= (2 if first or step != "rename" else calls)


def test_a_disk_that_stops_renaming_never_leaves_a_mixed_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in range(1, 5):
        folder = tmp_path / str(call)
        write_adapter(folder, adapter(), {"generation": 0})
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail_at(os.replace, call, always=True))
            with pytest.raises(OSError, match=r"No space left|could not be put back"):
                write_adapter(folder, adapter(1), {"generation": 1})
        if call == 1:
            assert_holds(folder, adapter(), {"generation": 0})
            continue
        with pytest.raises(CheckpointError, match="killed half-way"):
            read_config(folder)
        for name in hidden(folder):
            assert name.endswith(".old")
            os.replace(folder / name, folder / name[1:].rsplit(".", 2)[0])
        assert_holds(folder, adapter(), {"generation": 0})


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            work()
        except BaseException:
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(owner: object, name: str, call: int, before: bool) -> None:
    original, count = getattr(owner, name), 0

    def wrapped(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == call and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


# Every call to the system that a save makes through the module `os`, and the smallest number of each.
SYSTEM = {
    "open": 3,
    "fdopen": 2,
    "lstat": 2,
    "fchmod": 2,
    "fsync": 3,
    "listdir": 1,
    "replace": 4,
    "unlink": 2,
    "close": 1,
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", SYSTEM)
def test_killed_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner, calls = os, successful_calls(tmp_path, monkeypatch, os, name)
    assert calls >= SYSTEM[name]
    for call in range(1, calls + 1):
        for before in (True, False):
            folder = tmp_path / f"{call}{before}"
            write_adapter(folder, adapter(), {"generation": 0})

            def save(folder: Path = folder, call: int = call, before: bool = before) -> None:
                kill_at(owner, name, call, before)
                write_adapter(folder, adapter(1), {"generation": 1})

            assert in_child(save) == -signal.SIGKILL
            if (folder / CONFIG).exists():
                generation = read_config(folder)["generation"]
                assert_holds(folder, adapter(generation), {"generation": generation})
            else:
                with pytest.raises(CheckpointError, match=r"killed half-way.*\.old.*earlier"):
                    read_config(folder)
                kept = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
                for ending, generation in ((".old", 0), (".tmp", 1)):
                    rescued = tmp_path / f"{call}{before}{ending}"
                    rescued.mkdir()
                    for entry, content in kept.items():
                        if not entry.startswith("."):
                            (rescued / entry).write_bytes(content)
                    for entry, content in kept.items():
                        if entry.endswith(ending):
                            (rescued / entry[1:].rsplit(".", 2)[0]).write_bytes(content)
                    assert_holds(rescued, adapter(generation), {"generation": generation})
            write_adapter(folder, adapter(2), {"generation": 2})
            assert_holds(folder, adapter(2), {"generation": 2})
            assert hidden(folder) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_file_that_the_system_refuses_to_grow(tmp_path: Path) -> None:
    import resource

    write_adapter(tmp_path, adapter(), {"generation": 0})

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        with pytest.raises(OSError, match="File too large"):
            write_adapter(tmp_path, adapter(1), {"generation": 1})

    assert in_child(save) == 0
    assert_holds(tmp_path, adapter(), {"generation": 0})
    assert hidden(tmp_path) == []


def test_saves_at_once_to_one_folder_do_not_mix(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def save(generation: int) -> None:
        try:
            for _ in range(5):
                write_adapter(tmp_path, adapter(generation), {"generation": generation})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(generation,)) for generation in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    generation = read_config(tmp_path)["generation"]
    assert_holds(tmp_path, adapter(generation), {"generation": generation})
    assert hidden(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_save_to_one_folder_while_it_is_read_and_are_killed(tmp_path: Path) -> None:
    """A reader gets one save whole, or is told that another one came in between; a kill leaves one save whole."""
    write_adapter(tmp_path, adapter(), {"generation": 0})

    def saving(first: int) -> int:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            for generation in itertools.count(first, 2):
                write_adapter(tmp_path, adapter(generation), {"generation": generation})
        return child

    found, told = set(), set()
    for number in range(4):
        children = [saving(1 + 1000 * number), saving(2 + 1000 * number)]
        try:
            for _ in range(100):
                try:
                    config = read_config(tmp_path)
                    tensors = read_adapter(tmp_path, shapes_of(adapter()), config=config)
                except CheckpointError as error:
                    told.add(error.problems[0])
                else:
                    assert same(tensors, adapter(config["generation"]))
                    found.add(config["generation"])
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        if (tmp_path / CONFIG).exists():
            generation = read_config(tmp_path)["generation"]
            assert_holds(tmp_path, adapter(generation), {"generation": generation})
        else:
            with pytest.raises(CheckpointError, match=r"killed half-way.*\.old.*earlier"):
                read_config(tmp_path)
            write_adapter(tmp_path, adapter(), {"generation": 0})
    assert len(found) > 4
    assert told <= {f"another save to this folder came between reading this file and {WEIGHTS}; load again"}
    write_adapter(tmp_path, adapter(1), {"generation": 1})
    assert_holds(tmp_path, adapter(1), {"generation": 1})
    assert hidden(tmp_path) == []


def test_what_is_missing_while_somebody_saves_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two renames of a save the configuration has no name; that is no reason to speak of a killed process."""
    write_adapter(tmp_path, adapter(), {"generation": 0})
    stopped, go_on, replace = threading.Event(), threading.Event(), os.replace

    def slowly(source: Path, target: Path) -> None:
        replace(source, target)
        if str(target).endswith(".old"):
            stopped.set()
            assert go_on.wait(30)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", slowly)
        saving = threading.Thread(target=write_adapter, args=(tmp_path, adapter(1), {"generation": 1}))
        saving.start()
        assert stopped.wait(30) and not (tmp_path / CONFIG).exists()
        threading.Timer(0.2, go_on.set).start()
        assert read_config(tmp_path) == {"generation": 1}
        saving.join()
    assert_holds(tmp_path, adapter(1), {"generation": 1})


def test_permissions_are_those_of_the_old_file_or_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_adapter(tmp_path, adapter(), {})
        assert stat.S_IMODE((tmp_path / WEIGHTS).stat().st_mode) == 0o640
        (tmp_path / WEIGHTS).chmod(0o600)
        write_adapter(tmp_path, adapter(), {})
        assert stat.S_IMODE((tmp_path / WEIGHTS).stat().st_mode) == 0o600
    finally:
        os.umask(old)


def test_a_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"shared with other revisions")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / WEIGHTS).symlink_to(blob)
    write_adapter(tmp_path / "a", adapter(), {})
    assert blob.read_bytes() == b"shared with other revisions"
    assert_holds(tmp_path / "a", adapter(), {})
