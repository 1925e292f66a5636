"""Every Triton kernel interpreted on the CPU, over the generic cases and under the guard, in processes of their own.

Whether Triton interprets its kernels is decided when a process first imports them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from support.operators import ROW_DTYPES, row_count

from peftk.runtime import registry
from peftk.testing.cases import all_cases

pytest.importorskip("triton", reason="needs Triton, which has no package for this platform")

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
FAMILIES = {
    family: [o.name for o in registry.OPERATORS.values() if o.family == family and not o.name.endswith("_backward")]
    for family in sorted({o.family for o in registry.OPERATORS.values()})
}
DTYPES = ("f32", "f16", "f16-f32", "bf16", "bf16-f32")
SKIPS = (
    r"the Triton kernels take float32, float16 and bfloat16; got torch\.float64",
    r"the Triton kernels take a base of float32, float16 or bfloat16; got torch\.float64",
    r"the Triton kernels take float32 triangles; got torch\.float64",
    r"the Triton kernels take float32 factors; got torch\.float64",
    r"the exact transform is CUDA C\+\+'s or torch's: Triton has no inversion",
    r"the Triton kernels take the triangles of skew-symmetric matrices; got square ones",
)
"""The only reasons for which a test may be skipped there."""


def interpret(report: Path, *arguments: str) -> tuple[set[str], dict[str, str]]:
    """Run pytest with interpreted kernels; return the tests that passed, and the reasons of those skipped."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PEFTK_"))}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short"]
    result = subprocess.run(
        [*command, f"--junitxml={report}", *arguments],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    passed, skipped = set(), {}
    for case in ElementTree.parse(report).iter("testcase"):
        reason = case.find("skipped")
        if reason is None:
            passed.add(case.get("name"))
        else:
            skipped[case.get("name")] = reason.get("message")
    return passed, skipped


@pytest.mark.parametrize("family", FAMILIES)
def test_generic_cases_of(family: str, tmp_path: Path) -> None:
    names = FAMILIES[family]
    # Between dashes: the name of one operator may end with that of another.
    chosen = f"triton and ({' or '.join(f'-{name}-' for name in names)})"
    passed, skipped = interpret(tmp_path / "report.xml", str(TESTS / "ops" / "test_operators.py"), "-k", chosen)
    for name, reason in skipped.items():
        assert any(re.fullmatch(known, reason) for known in SKIPS), f"{name}: {reason}"
    # Every case ran in every dtype that a GPU computes in, and through every other test in float32.
    cases = [c for c in all_cases() if c.operator in names and not c.name.endswith(("-exact", "-square"))]
    expected = {f"test_matches_float64_formula[triton-{dtype}-{case}]" for case in cases for dtype in DTYPES}
    for test in ("layouts", "every_element_is_written", "equal_bits_every_time_and_for_any_threads"):
        expected |= {f"test_{test}[triton-{case}]" for case in cases}
    rowed = [case for case in cases if row_count(case) > 1]
    expected |= {f"test_no_row_reaches_another[triton-{dtype}-{case}]" for case in rowed for dtype in ROW_DTYPES}
    assert cases
    assert not expected - passed


def test_the_interpreter_finds_planted_errors(tmp_path: Path) -> None:
    passed, skipped = interpret(tmp_path / "report.xml", str(HERE / "interpreted"))
    assert not skipped
    assert {"test_out_of_bounds_load_is_caught[row]", "test_out_of_bounds_descriptor_is_caught"} <= passed
    assert "test_two_programs_storing_to_one_address_are_caught" in passed
    assert "test_design_matches_float64_formula[D1-low_rank_linear-two-row-tiles-bf16]" in passed
    assert "test_a_sum_beyond_float16_gives_what_it_is_multiplied_down_to" in passed
    assert "test_wrong_offsets_make_every_result_nan[dtype0-ends0]" in passed
    assert {"test_without_the_repair_bfloat16_is_wrong", "test_casts_round_to_nearest_even[torch.int32]"} <= passed
