"""Adapter files: what is saved comes back, in both libraries, and what does not fit says why."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.checkpoint_files import CONFIG, WEIGHTS, adapter, assert_holds, header_end, same, shapes_of
from torch import Tensor, nn

from peftk.checkpoint import CheckpointError, read_adapter, read_config, read_safetensors, write_adapter

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


# What is saved comes back


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {**adapter(3, dtype), "empty": torch.zeros(0, 6, dtype=dtype), "scalar": torch.tensor(1.5).to(dtype)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 1e-7, "target_modules": ["fc", "ä"], "none": None}
    write_adapter(tmp_path / "new" / "folder", tensors, config)
    assert_holds(tmp_path / "new" / "folder", tensors, config)
    file = read_safetensors(tmp_path / "new" / "folder" / WEIGHTS)
    assert file.verified
    assert file.metadata["format"] == "pt"
    assert set(file) == set(tensors) and len(file) == len(tensors)


def test_mixed_widths_are_aligned_and_readable_by_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        f"{dtype.itemsize} {dtype} {size}": torch.arange(size).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2)
        for size in (1, 3, 7)
    }
    write_adapter(tmp_path, tensors, {})
    assert same(safetensors.torch.load_file(tmp_path / WEIGHTS), tensors)
    content = (tmp_path / WEIGHTS).read_bytes()
    header = json.loads(content[8 : header_end(content)])
    assert header_end(content) % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.element_size() == 0 for name, tensor in tensors.items())
    assert same(read_adapter(tmp_path, shapes_of(tensors)), tensors)


def test_same_tensors_give_same_files(tmp_path: Path) -> None:
    tensors = adapter()
    write_adapter(tmp_path / "a", tensors, {"b": 1, "a": 2})
    write_adapter(tmp_path / "b", dict(reversed(tensors.items())), {"a": 2, "b": 1})
    assert (tmp_path / "a" / CONFIG).read_bytes() == (tmp_path / "b" / CONFIG).read_bytes()
    left, right = (read_safetensors(tmp_path / folder / WEIGHTS) for folder in "ab")
    # The safetensors library does not promise the order of its metadata, only the content.
    assert left.metadata == right.metadata
    assert list(left) == list(right)


def test_layouts_are_saved_contiguous(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    tensors = {
        "transposed": base.t(),
        "strided": torch.randn(6, 8)[::2, 1::3],
        "expanded": torch.randn(1, 8).expand(4, 8),
        "parameter": nn.Parameter(torch.randn(3)),
        "offset": torch.randn(9)[2:5],
    }
    write_adapter(tmp_path, tensors, {})
    back = read_adapter(tmp_path, shapes_of(tensors))
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor.detach()), name
        assert back[name].is_contiguous() and not back[name].requires_grad


def test_tensors_read_have_memory_of_their_own(tmp_path: Path) -> None:
    tensors = adapter()
    write_adapter(tmp_path, tensors, {})
    back = read_adapter(tmp_path, shapes_of(tensors))
    for tensor in back.values():
        tensor.fill_(7.0)
        tensor.resize_(2, 2)
    assert same(read_adapter(tmp_path, shapes_of(tensors)), tensors)
    write_adapter(tmp_path, back, {})


def test_order_is_that_of_expected(tmp_path: Path) -> None:
    tensors = adapter()
    write_adapter(tmp_path, tensors, {})
    expected = dict(reversed(shapes_of(tensors).items()))
    assert list(read_adapter(tmp_path, expected)) == list(expected)


# Hugging Face PEFT


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def peft_model() -> nn.Module:
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=["fc"], init_lora_weights=False))
    return model.eval()


def test_reads_what_hugging_face_peft_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import peft

    model = peft_model()
    model.save_pretrained(tmp_path)
    truth = peft.get_peft_model_state_dict(model)
    with caplog.at_level("INFO", logger="peftk"):
        assert same(read_adapter(tmp_path, shapes_of(truth)), dict(truth))
    assert "unverified" in caplog.text
    assert not read_safetensors(tmp_path / WEIGHTS).verified
    config = read_config(tmp_path)
    assert (config["peft_type"], config["r"]) == ("LORA", 4)


def test_hugging_face_peft_loads_what_is_written(tmp_path: Path) -> None:
    import peft

    model = peft_model()
    x = torch.randn(3, 6)
    model.save_pretrained(tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    write_adapter(tmp_path / "ours", peft.get_peft_model_state_dict(model), config)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours").eval()
    assert torch.equal(loaded(x), model(x))
    assert not torch.equal(loaded(x), loaded.get_base_model().fc.base_layer(x))


# An adapter that does not fit


def test_every_problem_is_listed_in_one_message(tmp_path: Path) -> None:
    tensors = {
        "m.lora_A.weight": torch.zeros(4, 6),
        "m.lora_B.weights": torch.zeros(5, 4),
        "m.ints": torch.zeros(2, dtype=torch.int64),
        "m.nan": torch.tensor([math.nan, 1.0]),
    }
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    expected = {"m.lora_A.weight": (6, 4), "m.lora_B.weight": (5, 4), "m.ints": (2,), "m.nan": (2,)}
    with pytest.raises(CheckpointError) as caught:
        read_adapter(tmp_path, expected)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / WEIGHTS))
    for part in (
        "missing key 'm.lora_B.weight', expected shape (5, 4)",
        "unexpected key 'm.lora_B.weights'; closest expected 'm.lora_B.weight'",
        "key 'm.lora_A.weight': shape expected (6, 4), got (4, 6)",
        "key 'm.ints': dtype expected floating, got torch.int64",
        "key 'm.nan': values expected finite, got 1 NaN and 0 infinite of 2 values",
    ):
        assert part in message
    assert len(caught.value.problems) == 5
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.file, copy.problems) == (message, caught.value.file, caught.value.problems)


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    write_adapter(tmp_path, {f"layer.{i}.lora_a": torch.zeros(1) for i in range(500)}, {})
    with pytest.raises(CheckpointError) as caught:
        read_adapter(tmp_path, {f"layer.{i}.lora_A": (1,) for i in range(500)})
    message = str(caught.value)
    assert "and 492 more missing keys" in message and "and 492 more unexpected keys" in message
    assert message.count("\n") < 25


def test_expected_must_be_shapes(tmp_path: Path) -> None:
    write_adapter(tmp_path, adapter(), {})
    for expected in ([], {"a": 3}, {"a": None}):
        with pytest.raises(TypeError, match="expected: wanted a dict from key to shape"):
            read_adapter(tmp_path, expected)  # type: ignore[arg-type]


def test_missing_folder_and_files(tmp_path: Path) -> None:
    for call in (lambda f: read_config(f), lambda f: read_adapter(f, {})):
        with pytest.raises(CheckpointError, match=r"gone: expected an existing folder.*got nothing"):
            call(tmp_path / "gone")
        with pytest.raises(CheckpointError, match=r"adapter_.*: expected this file"):
            call(tmp_path)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be opened: No such file"):
        read_safetensors(tmp_path / "a.safetensors")


# The config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"r": 8, "r": 16}', "'r' occurs twice"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "'b' occurs twice"),
        (b'{"lora_alpha": NaN}', "NaN"),
        (b'{"lora_alpha": -Infinity}', "-Infinity"),
        (b'{"lora_alpha": 1e400}', "too large"),
        (b'{"r": ' + b"9" * 500_000 + b"}", "500000 digits"),
        (b'\xef\xbb\xbf{"r": 8}', "byte order mark"),
        (b'{"r": "\xff"}', "not UTF-8"),
        ('{"r": 8}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": ' + b"[" * 400_000 + b"]" * 400_000 + b"}", "nested too deeply"),
        (b'{"a": ' * 33 + b"1" + b"}" * 33, "nested too deeply"),
        (b'{"a": "' + b"x" * 1_000_000 + b'"}', "at most 1000000 bytes"),
    ],
)
def test_bad_config_files(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / CONFIG).write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path / CONFIG) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_config_is_data_only(tmp_path: Path) -> None:
    config = {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}, "base_model_name_or_path": "../x"}
    write_adapter(tmp_path, adapter(), config)
    assert read_config(tmp_path) == config


def test_an_edited_config_is_accepted(tmp_path: Path) -> None:
    write_adapter(tmp_path, adapter(), {"base_model_name_or_path": "a"})
    (tmp_path / CONFIG).write_text('{"base_model_name_or_path": "b"}')
    assert_holds(tmp_path, adapter(), {"base_model_name_or_path": "b"})
