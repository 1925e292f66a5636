"""The table of methods, layers, backends and dtypes in README.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftk.kernels import native as native_kernels
from peftk.runtime import registry
from tools import support_table
from tools.subjects import subjects

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def lora():
    return next(found for found in subjects() if found.method == "LoRA")


@pytest.mark.skipif(native_kernels.unavailable() is not None, reason="the table has columns for the C++ kernels")
def test_the_readme_is_up_to_date(capsys):
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    assert support_table.main(["--check"]) == 0, "run: python -m tools.support_table"
    assert capsys.readouterr().out == "up to date\n"


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="expected the markers <!-- support table: begin -->"):
        support_table.updated("nothing", "table")
    page = f"a {support_table.BEGIN} old {support_table.END} b"
    assert support_table.updated(page, "new") == f"a {support_table.BEGIN}\nnew\n{support_table.END} b"


def test_entries_tell_whole_from_some():
    one, two = torch.float32, torch.float16
    every = {dtype: [True, True] for dtype in support_table.DTYPES}
    assert support_table._entry(every) == "all"
    assert support_table._entry({one: [True, True], two: [True, False]}) == "f32 (f16)"
    assert support_table._entry({one: [False], two: [True]}) == "f16"
    assert support_table._entry({one: [False], two: [False]}) == "-"
    assert support_table._entry({one: [], two: []}) == "no operator"


def test_a_wrong_kernel_gets_no_entry(lora, monkeypatch):
    if native_kernels.unavailable() is not None:
        pytest.skip("there are no C++ kernels")
    operator = registry.OPERATORS["low_rank_linear"]
    run, supports = operator.kernel("native")

    def wrong(*args):
        y, hidden = run(*args)
        return 2 * y, hidden

    monkeypatch.setitem(operator._kernels, "native", (wrong, supports))
    with pytest.raises(AssertionError, match=r"C\+\+ in f32: output: expected an error of at most"):
        support_table.row_of(lora)


def test_a_predicate_that_says_no_is_shown(lora, monkeypatch):
    pytest.importorskip("triton")
    operator = registry.OPERATORS["low_rank_linear_backward"]
    kernel = operator.kernel("triton")
    if isinstance(kernel, str):
        pytest.skip(kernel)
    monkeypatch.setitem(operator._kernels, "triton", (kernel[0], lambda *args: "not today"))
    row = support_table.row_of(lora)
    assert dict(zip(support_table.BACKENDS, row.entries, strict=True))["Triton"] == "(f32 bf16 f16)"
