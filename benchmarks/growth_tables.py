"""The table of how the cost of an adapter grows."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .results import Comparison, Results
from .tables import Table


def _slope(points: list[tuple[float, float]]) -> str:
    """Return the slope between the ends on logarithmic axes; a dash where a cost is not above zero."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    return "-" if min(y0, y1) <= 0 or x0 == x1 else f"{math.log(y1 / y0) / math.log(x1 / x0):.2f}"


def _bytes(c: Comparison) -> float:
    own, frozen = (c.rows[arm].found.get("peak_bytes") for arm in ("peftk", "frozen"))
    return 0.0 if own is None or frozen is None else own - frozen


def growth(results: Results) -> Iterable[Table]:
    """Return the table: a method and what grows in each row."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for c in results.of("growth"):
        if all(row.measured for row in c.rows.values()):
            groups.setdefault((c.info["method"], c.info["mode"]), []).append(c)
    rows = []
    for (_, axis), found in groups.items():
        found.sort(key=lambda c: c.info["value"])
        costs = [(c.info["value"], c.difference("peftk", "frozen") or 0.0) for c in found]
        values = " / ".join(f"{value}" for value, _ in costs)
        times = " / ".join(f"{cost / 1000:.2f}" for _, cost in costs)
        theory = _slope([(c.info["value"], c.info["operations"]) for c in found])
        memory = " / ".join(f"{_bytes(c) / 2**20:.1f}" for c in found)
        title = found[0].info["cell"].partition(",")[0]
        rows.append((title, axis, values, times, _slope(costs), theory, memory, _slope_of_bytes(found)))
    if rows:
        yield Table(
            "Growth: milliseconds that an adapter adds",
            "Forward and backward of one linear layer, less those of the frozen layer, in float32: 512 rows of 1024 "
            "features but where they grow. The slope is that between the ends on logarithmic axes; beside it that of "
            "the operations, counted by torch in the same steps, less those of the frozen layer. Then the peak memory "
            "above the frozen layer's in MiB, and its slope. A dash: nothing is added at one end.",
            ("method", "grows", "values", "ms", "slope", "of operations", "MiB", "slope"),
            rows,
        )


def _slope_of_bytes(found: list[Comparison]) -> str:
    return _slope([(c.info["value"], _bytes(c)) for c in found])
