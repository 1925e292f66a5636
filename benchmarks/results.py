"""From pytest-benchmark's JSON to comparisons, and from those to CSV."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = (
    "suite",
    "cell",
    "method",
    "mode",
    "tokens",
    "in_features",
    "out_features",
    "size",
    "dtype",
    "parameters",
    "arm",
    "status",
    "reason",
    "remark",
    "backends",
    "samples",
    "calls_per_sample",
    "median_us",
    "p20_us",
    "p80_us",
    "min_us",
    "reference",
    "ratio",
    "ratio_q25",
    "ratio_q75",
    "difference_us",
    "wall_median_us",
    "wall_ratio",
    "wall_ratio_q25",
    "wall_ratio_q75",
    "first_seconds",
    "kernels",
    "error_output",
    "error_gradients",
    "error_limit",
    "saved_bytes",
    "peak_bytes",
    "device_class",
    "threads",
    "load_before",
    "load_after",
    "date",
    "torch",
    "triton",
    "peftk",
    "peft",
    "lycoris_lora",
)


OUT_OF_TIME = "not measured: the time of this run was over"


@dataclass(frozen=True)
class Row:
    """One arm of one comparison.

    Attributes:
        info: what identifies the comparison, and the machine.
        name: the arm.
        found: what was found out about it.
    """

    info: dict[str, Any]
    name: str
    found: dict[str, Any]

    @property
    def measured(self) -> bool:
        """Whether the row holds times: the result was right."""
        return self.found["status"] == "measured"

    @property
    def ratio(self) -> float | None:
        """Median of the ratios to the reference arm, of samples of the same round."""
        return self.found.get("ratio") if self.measured else None

    def error(self, output: bool) -> float | None:
        """Return the largest error of the output, or of the gradients."""
        errors = self.found.get("errors") or {}
        chosen = [e for name, e in errors.items() if name.startswith("d") is not output]
        return max(chosen, default=None)


class Comparison:
    """The arms of one test.

    Args:
        info: pytest-benchmark's `extra_info`.
    """

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = {key: value for key, value in info.items() if key != "arms"}
        self.rows = {name: Row(self.info, name, found) for name, found in info["arms"].items()}

    @property
    def key(self) -> tuple[str, str]:
        """What a newer run of the same comparison has in common with this one."""
        return self.info["suite"], self.info["cell"]

    def ratio(self, arm: str, to: str) -> float | None:
        """Return the median of the paired ratios of two arms, or None if one of them has no times."""
        times = self._times(arm, to)
        return None if times is None else statistics.median(a / b for a, b in zip(*times, strict=True))

    def difference(self, arm: str, to: str) -> float | None:
        """Return the median of the paired differences of two arms in microseconds, or None."""
        times = self._times(arm, to)
        return None if times is None else statistics.median(a - b for a, b in zip(*times, strict=True))

    def _times(self, *arms: str) -> tuple[list[float], ...] | None:
        rows = [self.rows.get(arm) for arm in arms]
        if any(row is None or not row.measured for row in rows):
            return None
        samples = [row.found["samples_us"] for row in rows]
        # A slow arm has taken part in the first rounds only.
        shared = min(map(len, samples))
        return tuple(times[:shared] for times in samples)


@dataclass(frozen=True)
class Results:
    """All comparisons of a run, and why some cells have none.

    Attributes:
        comparisons: in the order of the files.
        not_measured: test to the reason why it was skipped or failed.
    """

    comparisons: list[Comparison]
    not_measured: dict[str, str]

    def of(self, suite: str) -> list[Comparison]:
        """Return the comparisons of one suite."""
        return [c for c in self.comparisons if c.info["suite"] == suite]

    @property
    def info(self) -> dict[str, Any]:
        """The machine and the versions of the last comparison."""
        return self.comparisons[-1].info


def read(paths: Iterable[Path]) -> Results:
    """Read comparisons from pytest-benchmark's files; of equal ones the last file's counts.

    Raises:
        ValueError: if a file is not one of pytest-benchmark's, or there is no comparison in any.
    """
    found: dict[tuple, Comparison] = {}
    not_measured: dict[str, str] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text())
            benchmarks = content["benchmarks"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a file that pytest-benchmark wrote; got {error!r}") from error
        not_measured.update(content.get("not_measured", {}))
        for benchmark in benchmarks:
            # A test that died before its check has no arms: `not_measured` says why.
            if "arms" in benchmark.get("extra_info", {}):
                comparison = Comparison({**benchmark["extra_info"], "test": benchmark["fullname"]})
                found[comparison.key] = comparison
                if all(r.measured for r in comparison.rows.values()):
                    not_measured.pop(benchmark["fullname"], None)
    if not found:
        raise ValueError("benchmarks: expected at least one comparison in the files; got none")
    return Results(list(found.values()), not_measured)


def read_written(path: Path) -> Results:
    """Read what `write_json` wrote."""
    content = json.loads(path.read_text())
    return Results([Comparison(info) for info in content["comparisons"]], content["not_measured"])


def joined(older: Results, newer: Results) -> Results:
    """Return the comparisons of two runs on one device; of equal ones the newer counts.

    Not measured is what neither run had time for, and what failed when it was last tried.
    """
    found = {c.key: c for c in (*older.comparisons, *newer.comparisons)}
    before, now = ({c.info["test"] for c in run.comparisons} for run in (older, newer))
    missing = {test: reason for test, reason in older.not_measured.items() if test not in now}
    for test, reason in newer.not_measured.items():
        if not reason.startswith(OUT_OF_TIME) or test not in before:
            missing[test] = reason
    return Results(list(found.values()), missing)


def csv_rows(comparisons: Iterable[Comparison]) -> Iterator[dict[str, Any]]:
    """Yield one dictionary with the keys `COLUMNS` for each arm."""
    for comparison in comparisons:
        info = {**comparison.info, **comparison.info["versions"]}
        for name, row in comparison.rows.items():
            found = row.found
            values = {column: info.get(column) for column in COLUMNS}
            values.update({c: found[c] for c in COLUMNS if c in found and not isinstance(found[c], (dict, list))})
            times = found.get("samples_us", []) if row.measured else []
            if times:
                deciles = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
                values.update(p20_us=round(deciles[0], 3), p80_us=round(deciles[-1], 3), samples=len(times))
            else:
                values.update(samples=0, calls_per_sample=None, reference=None)
            values.update(
                arm=name,
                backends=" ".join(sorted(set((found.get("backends") or {}).values()))),
                error_output=row.error(output=True),
                error_gradients=row.error(output=False),
                error_limit=found.get("limit"),
                difference_us=_rounded(comparison.difference(name, comparison.info["reference"])),
            )
            yield values


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def write_csv(path: Path, comparisons: Iterable[Comparison]) -> None:
    """Write one line for each arm of each comparison."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for values in csv_rows(comparisons):
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in values.items()})


def write_json(path: Path, results: Results) -> None:
    """Write what the comparisons hold, every sample included, and nothing that names the machine."""
    items = [{**c.info, "arms": {name: row.found for name, row in c.rows.items()}} for c in results.comparisons]
    lines = ",\n".join(json.dumps(item) for item in items)
    path.write_text(f'{{"not_measured": {json.dumps(results.not_measured)},\n"comparisons": [\n{lines}\n]}}\n')
