"""The plots of the report."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .results import Comparison, Results
from .tables import DISPATCH_TARGET_US, LAYER_ARMS, PEERS, binding, short, target

COLOURS = {
    "peftk": "#c8102e",
    "peftk-torch": "#eda1aa",
    "hf": "#3b6fb6",
    "compile": "#3a9d8f",
    "lycoris": "#e5a323",
    "frozen": "#9aa0a6",
    "native": "#c8102e",
    "torch": "#9aa0a6",
}
STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": "#e3e5e8",
    "axes.edgecolor": "#8a8f98",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 120,
}


def _text(axes: Axes, x: float, y: float, text: str, size: float = 7.5, left: bool = False) -> None:
    """Write a label beside a point, on a ground that lines behind it do not cross."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.85}
    side = {"xytext": (-3, 0), "ha": "right"} if left else {"xytext": (3, 0), "ha": "left"}
    axes.annotate(
        text, (x, y), textcoords="offset points", va="center", fontsize=size, color="#3c4043", bbox=box, **side
    )


def _rows(axes: Axes, names: list[str]) -> None:
    # What makes a name long stands on a line of its own.
    axes.set_yticks(range(len(names)), [name.replace(", bf16 base", ",\nbf16 base") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    for edge in range(1, len(names)):
        axes.axhline(edge - 0.5, color="#e3e5e8", linewidth=0.8)


def _figure(rows: int, each: float = 0.5, columns: int = 1, width: float = 9.0) -> tuple[Figure, Any]:
    return pyplot.subplots(1, columns, figsize=(width, 1.6 + each * rows), sharey=columns > 1, layout="constrained")


def _legend(figure: Figure, arms: dict[str, str], marker: str = "s", extra: list[Line2D] | None = None) -> None:
    handles = [
        Line2D([], [], color=COLOURS[arm], marker=marker, linestyle="", markersize=7, label=label)
        for arm, label in arms.items()
    ]
    handles += extra or []
    # Above, where it is read first: with all methods and dtypes the figure is longer than a screen.
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6))


def _present(found: list[Comparison], arms: dict[str, str]) -> dict[str, str]:
    return {a: label for a, label in arms.items() if any(a in c.rows and c.rows[a].measured for c in found)}


def _by_width(found: list[Comparison], large: bool) -> list[Comparison]:
    """Return the comparisons of small widths, or those of large ones if there are both: one picture for each."""
    narrow = [c for c in found if c.info["in_features"] <= 1024]
    wide = [c for c in found if c not in narrow]
    return (wide if narrow else []) if large else narrow or wide


def _on_device(found: list[Comparison]) -> bool:
    return any(c.info.get("clock") == "events" for c in found)


def overhead(results: Results, large: bool = False, wall: bool = False) -> Figure | None:
    """Bars: multiples of the frozen layer, with quartiles and targets; on a GPU of the device time, or of wall time."""
    found = _by_width([c for c in results.of("layers") if c.rows["frozen"].measured], large)
    if not found or (wall and not _on_device(found)):
        return None
    arms = _present(found, LAYER_ARMS)
    key = "wall_ratio" if wall else "ratio"
    figure, axes = _figure(len(found), 0.72)
    height = 0.84 / len(arms)
    # A few slow peers must not press all the others against the axis.
    ratios = sorted(c.rows[a].found[key] for c in found for a in arms if a in c.rows and c.rows[a].ratio)
    limit = max(1.2, min(ratios[-1] * 1.12, 5.0 if wall else 3.0))
    for at, comparison in enumerate(found):
        for slot, arm in enumerate(arms):
            row = comparison.rows.get(arm)
            if row is None or row.ratio is None:
                continue
            y = at - 0.42 + height * (slot + 0.5)
            ratio, low, high = (row.found[name] for name in (key, f"{key}_q25", f"{key}_q75"))
            axes.barh(y, min(ratio, limit) - 1, height * 0.9, left=1, color=COLOURS[arm])
            if ratio <= limit:
                axes.plot([low, min(high, limit)], [y, y], color="#202124", linewidth=1)
            label = min(max(ratio, high), limit)
            text = f"{ratio:.2f}" if ratio <= limit else f"\u2192 {ratio:.1f}"
            _text(axes, label, y, text)
        asked = target(comparison)
        if asked is not None and binding(comparison) and not wall:
            axes.plot([asked, asked], [at - 0.45, at + 0.45], color="#202124", linewidth=1.4, linestyle=(0, (2, 1.5)))
    axes.axvline(1, color="#5f6368", linewidth=1)
    axes.set_xlim(min(0.97, ratios[0] - 0.02), limit + 0.07 * (limit - 1))
    kind = "wall time" if wall else "device time" if _on_device(found) else "time"
    axes.set_xlabel(f"{kind} of forward + backward, in multiples of the frozen layer (line: quartiles)")
    _rows(axes, [short(c) for c in found])
    axes.set_title("Overhead of one layer alone, waiting for the host" if wall else "Overhead over the frozen layer")
    line = [Line2D([], [], color="#202124", linestyle=(0, (2, 1.5)), label="target for peftk")]
    _legend(figure, arms, extra=[] if wall else line)
    return figure


def _dots(
    found: list[Comparison],
    arms: dict[str, str],
    value: Callable[[Comparison, str], float | None],
    title: str,
    label: str,
) -> tuple[Figure, Axes]:
    figure, axes = _figure(len(found), 0.4)
    for at, comparison in enumerate(found):
        shown = [arm for arm in arms if value(comparison, arm) is not None]
        for slot, arm in enumerate(shown):
            # Equal values would hide each other on one line.
            y = at + 0.5 * ((slot + 0.5) / len(shown) - 0.5)
            axes.plot(value(comparison, arm), y, "o", color=COLOURS[arm], markersize=6)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_title(title)
    _rows(axes, [short(c) for c in found])
    _legend(figure, arms, marker="o")
    return figure, axes


def speed_up(results: Results, large: bool = False) -> Figure | None:
    """Dots: the peers' times over peftk's."""
    found = _by_width([c for c in results.of("layers") if c.rows["peftk"].measured], large)
    if not found:
        return None
    arms = _present(found, PEERS)
    title = "Speed-up of peftk over its peers"
    kind = "device time" if _on_device(found) else "time"
    label = f"peer's {kind} / peftk's (right of 1: peftk is faster)"
    figure, axes = _dots(found, arms, lambda c, a: c.ratio(a, "peftk"), title, label)
    axes.axvline(1, color="#5f6368", linewidth=1)
    low, high = axes.get_xlim()
    low, high = min(low, 0.9), max(high, 1.25)
    wide, narrow = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50), (0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5, 3)
    ticks = [t for t in (wide if high > 4 else narrow) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high)
    return figure


def errors(results: Results, large: bool = False) -> Figure | None:
    """Dots: the largest error of the gradients of every arm, and the limit."""
    found = _by_width(results.of("layers"), large)
    if not found:
        return None
    arms = _present(found, {"frozen": "frozen layer", **LAYER_ARMS})

    def value(comparison: Comparison, arm: str) -> float | None:
        row = comparison.rows.get(arm)
        known = (row.found.get("errors") or {}).values() if row else ()
        return max(known, default=None)

    title = "Error against float64, the largest of output and gradients"
    figure, axes = _dots(found, arms, value, title, "relative error (Frobenius norm); bar: the limit of the dtype")
    for at, comparison in enumerate(found):
        limit = comparison.rows["peftk"].found.get("limit")
        if limit:
            axes.plot([limit, limit], [at - 0.4, at + 0.4], color="#202124", linewidth=2)
    return figure


def memory(results: Results, large: bool = False) -> Figure | None:
    """Bars: bytes kept for backward, and the peak above the frozen layer's."""
    found = _by_width([c for c in results.of("layers") if "peak_bytes" in c.rows["frozen"].found], large)
    if not found:
        return None
    arms = _present(found, LAYER_ARMS)
    figure, both = _figure(len(found), 0.62, columns=2, width=10.0)
    height = 0.84 / len(arms)
    titles = ("Kept for backward", "Peak, above the frozen layer's")
    for axes, key, title in zip(both, ("saved_bytes", "peak_bytes"), titles, strict=True):
        bars = []
        for at, comparison in enumerate(found):
            below = comparison.rows["frozen"].found["peak_bytes"] if key == "peak_bytes" else 0
            for slot, arm in enumerate(arms):
                row = comparison.rows.get(arm)
                if row is not None and row.found.get(key) is not None:
                    mib = max(row.found[key] - below, 0) / 2**20
                    bars.append((at - 0.42 + height * (slot + 0.5), mib, COLOURS[arm]))
        # As above: a few arms that keep far more must not press all the others against the axis.
        sizes = sorted(mib for _, mib, _ in bars)
        limit = min(sizes[-1], 1.5 * sizes[9 * len(sizes) // 10]) if sizes else 0.0
        limit = limit or max(sizes, default=0.0)
        for y, mib, colour in bars:
            axes.barh(y, min(mib, limit), height * 0.9, color=colour)
            text = f"{mib:,.0f}" if mib >= 100 else f"{mib:.2g}" if mib >= 0.005 else "0"
            _text(axes, min(mib, limit), y, text if mib <= limit else f"\u2192 {text}", 7)
        axes.set_xlim(0, limit * 1.14 if limit else 1)
        axes.set_xlabel("MiB")
        axes.set_title(title)
        _rows(axes, [short(c) for c in found])
    _legend(figure, arms)
    return figure


def kernels(results: Results, large: bool = False) -> Figure | None:
    """Bars: how much faster C++ is than plain PyTorch, kernel by kernel."""
    found = _by_width([c for c in results.of("kernels") if c.ratio("torch", "native") is not None], large)
    if not found:
        return None
    figure, axes = _figure(len(found), 0.24)
    for at, comparison in enumerate(found):
        ratio = comparison.ratio("torch", "native")
        axes.barh(at, ratio - 1, 0.7, left=1, color=COLOURS["native" if ratio >= 1 else "torch"])
        _text(axes, ratio, at, f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", left=ratio < 1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8) / 1.15, max(high, 1.5) * 1.25)
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if axes.get_xlim()[0] <= t <= high * 1.25]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color="#5f6368", linewidth=1)
    axes.set_xlabel("torch kernel's time / C++ kernel's time")
    axes.set_title("C++ kernels beside plain PyTorch")
    _rows(axes, [short(c) for c in found])
    return figure


def dispatch(results: Results) -> Figure | None:
    """Bars: microseconds that a public function takes beyond plain PyTorch, on each backend."""
    costs: dict[str, dict[str, float]] = {}
    for c in results.of("overhead"):
        if c.info["mode"] == "forward" and (cost := c.difference("peftk", "plain")) is not None:
            arm = "peftk" if c.info["cell"].endswith("native") else "peftk-torch"
            costs.setdefault(c.info["method"], {})[arm] = cost
    if not costs:
        return None
    figure, axes = _figure(len(costs), 0.42)
    # One kernel for many small calls of torch saves far more than a dispatch costs: that must not set the scale.
    limit = 5 * DISPATCH_TARGET_US
    for at, row in enumerate(costs.values()):
        for slot, arm in enumerate(("peftk", "peftk-torch")):
            if arm in row:
                y, cost = at - 0.2 + 0.4 * slot, row[arm]
                axes.barh(y, max(-limit, min(cost, limit)), 0.36, color=COLOURS[arm])
                sign = "" if abs(cost) <= limit else "\u2192 " if cost > 0 else "\u2190 "
                _text(axes, max(0, min(cost, limit)), y, f"{sign}{cost:.1f}")
    axes.axvline(0, color="#202124", linewidth=0.8)
    axes.axvline(DISPATCH_TARGET_US, color="#202124", linewidth=1.4, linestyle=(0, (2, 1.5)), zorder=0.5)
    axes.set_xlim(-1.02 * limit, 1.14 * limit)
    axes.set_xlabel("microseconds a call beyond plain PyTorch (arrow: off the scale)")
    axes.set_title("What the dispatch costs, forward")
    _rows(axes, list(costs))
    line = [Line2D([], [], color="#202124", linestyle=(0, (2, 1.5)), label="target of the native backend")]
    _legend(figure, {"peftk": "native backend", "peftk-torch": "torch backend"}, extra=line)
    return figure


_BOTH_WIDTHS = {
    "overhead": (overhead, "Overhead over the frozen layer"),
    "overhead_wall": (functools.partial(overhead, wall=True), "Overhead of one layer alone, in wall time"),
    "speed_up": (speed_up, "Speed-up over peers"),
    "errors": (errors, "Error against float64"),
    "memory": (memory, "Memory"),
    "kernels": (kernels, "C++ kernels beside plain PyTorch"),
}

PLOTS: dict[str, tuple[Callable[[Results], Figure | None], str]] = {}
for _name, (_function, _title) in _BOTH_WIDTHS.items():
    PLOTS[_name] = _function, _title
    PLOTS[f"{_name}_wide"] = functools.partial(_function, large=True), f"{_title}, wide layers"
PLOTS["dispatch"] = dispatch, "Cost of the dispatch"


def draw(results: Results) -> Iterator[tuple[str, str, bytes]]:
    """Yield the name, the title and the PNG of every plot that there is data for."""
    for name, (function, title) in PLOTS.items():
        with pyplot.rc_context(STYLE):
            figure = function(results)
            if figure is None:
                continue
            buffer = io.BytesIO()
            # Without the date and the version that matplotlib writes, equal data give equal files.
            figure.savefig(buffer, format="png", metadata={"Software": None})
            pyplot.close(figure)
        yield name, title, buffer.getvalue()
