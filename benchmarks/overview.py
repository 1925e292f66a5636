"""One page over all machine classes, and the figures in the README: ``python -m benchmarks.overview [--check]``.

Everything comes from the `results.json` of the classes below `benchmarks/results`. The page needs no other file: charts
are in it, and all tables of every class.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.support_table import updated

from .report import RESULTS, STYLE, inline, table_html
from .results import Comparison, Results, read_written
from .tables import everything

README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
PEERS = {"hf": "PEFT", "lycoris": "LyCORIS", "compile": "torch.compile"}


class Group(NamedTuple):
    """Comparisons that belong together.

    Attributes:
        title: What they are called.
        mine: The arm of this package.
        holds: Whether a comparison is one of them.
    """

    title: str
    mine: str
    holds: Callable[[Comparison], bool]


def _suite(*names: str) -> Callable[[Comparison], bool]:
    return lambda c: c.info["suite"] in names


GROUPS = (
    Group("layers, forward and backward", "peftk", _suite("layers", "layers-half")),
    Group("layers, forward", "peftk", _suite("layers-forward")),
    Group("layers of PEFT, accelerated", "accelerated", lambda c: _suite("accelerate")(c) and c.info["mode"] != "step"),
    Group("steps of PEFT models, accelerated", "accelerated", lambda c: c.info["mode"] == "step"),
    Group("steps of models", "peftk", lambda c: c.info["mode"] == "step"),
    Group("LyCORIS's networks, accelerated", "accelerated", _suite("lycoris")),
    Group("few rows without gradients", "peftk", lambda c: _suite("decode")(c) and "generate" not in c.info["mode"]),
    Group("generating", "peftk", lambda c: _suite("decode")(c) and "generate" in c.info["mode"]),
    Group("LoRA on experts", "peftk", _suite("experts")),
)


class Gain(NamedTuple):
    """How many times as long a peer takes, over all cells of a group."""

    group: str
    peer: str
    median: float
    least: float
    most: float
    cells: int


def gains(results: Results) -> list[Gain]:
    """Return the gains of a class over every peer, by group."""
    found = []
    for group in GROUPS:
        chosen = [c for c in results.comparisons if group.holds(c)]
        for peer, title in PEERS.items():
            values = [v for c in chosen if (v := c.ratio(peer, group.mine)) is not None]
            if values:
                found.append(Gain(group.title, title, statistics.median(values), min(values), max(values), len(values)))
    return found


def classes(folder: Path = RESULTS) -> dict[str, Results]:
    """Return the results of every machine class, by its name."""
    return {path.parent.name: read_written(path) for path in sorted(folder.glob("*/results.json"))}


def figures(found: dict[str, Results]) -> str:
    """Return the table for the README."""
    lines = ["| machine class | what | beside | median | least | most | cells |", "|---|---|---|---|---|---|---|"]
    for name, results in found.items():
        for gain in gains(results):
            numbers = f"{gain.median:.2f}x | {gain.least:.2f}x | {gain.most:.2f}x | {gain.cells}"
            lines.append(f"| {name} | {gain.group} | {gain.peer} | {numbers} |")
    return "\n".join(lines)


def _png(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    draw(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return base64.b64encode(stream.getvalue()).decode()


def _cells(results: Results) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Return methods, columns (a group beside a peer), and the median gain of each."""
    values: dict[tuple[str, str], list[float]] = {}
    for group in GROUPS:
        for c in filter(group.holds, results.comparisons):
            for peer, title in PEERS.items():
                ratio = c.ratio(peer, group.mine)
                if ratio is not None:
                    values.setdefault((c.info["method"].lower(), f"{group.title}\n{title}"), []).append(ratio)
    methods = sorted({method for method, _ in values})
    columns = list(dict.fromkeys(column for _, column in values))
    return methods, columns, {key: statistics.median(found) for key, found in values.items()}


def heat_map(results: Results) -> str | None:
    """Return a picture of the gains by method, or None where nothing was compared."""
    import numpy as np
    from matplotlib.colors import LogNorm

    methods, columns, values = _cells(results)
    if not methods:
        return None
    grid = np.full((len(methods), len(columns)), np.nan)
    for (method, column), value in values.items():
        grid[methods.index(method), columns.index(column)] = value

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.imshow(grid, aspect="auto", cmap="RdYlGn", norm=LogNorm(1 / 4, 4))
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
        axes.set_yticks(range(len(methods)), methods, fontsize=9)
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axes.set_title("How many times as long the other takes (median)", fontsize=10)

    return _png(draw, (3 + 1.1 * len(columns), 2.2 + 0.32 * len(methods)))


def overhead(results: Results) -> str | None:
    """Return a picture of what a layer takes over the frozen one, or None where that was not measured."""
    suites = ("layers", "layers-half") if results.of("layers") else ("decode",)
    found: dict[str, dict[str, list[float]]] = {}
    for c in filter(_suite(*suites), results.comparisons):
        for arm in ("peftk", "hf"):
            ratio = c.ratio(arm, "frozen")
            if ratio is not None and "generate" not in c.info["mode"]:
                found.setdefault(c.info["method"], {}).setdefault(arm, []).append(ratio)
    if not found:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for offset, arm, colour in ((-0.2, "peftk", "#1f6fb4"), (0.2, "hf", "#d1742f")):
            places = [i + offset for i, arms in enumerate(found.values()) if arm in arms]
            sizes = [statistics.median(arms[arm]) for arms in found.values() if arm in arms]
            bars = axes.bar(places, sizes, width=0.38, color=colour, label="peftk" if arm == "peftk" else "PEFT")
            axes.bar_label(bars, labels=[f"{size:.2f}" for size in sizes], fontsize=7)
        axes.axhline(1, color="#8a8a8a", linestyle="--", linewidth=1)
        axes.set_yscale("log")
        axes.set_xticks(range(len(found)), list(found), fontsize=9)
        axes.set_ylabel("of the frozen layer (median)")
        what = "forward and backward" if suites[0] == "layers" else "few rows without gradients"
        axes.set_title(f"What a layer with an adapter takes: {what}", fontsize=10)
        axes.legend(frameon=False)

    return _png(draw, (2.5 + 0.9 * len(found), 3.6))


def _pictures(pictures: Iterable[tuple[str, str | None]]) -> str:
    return "".join(
        f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></p>' for name, data in pictures if data
    )


def page(found: dict[str, Results]) -> str:
    """Return the page."""
    title = "peftk: figures of every machine class"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style><h1>{title}</h1>'
        '<p class="note">Each class was measured on its own machine, with the versions named; numbers of two classes '
        "are not to be compared. What a class has no rows of was not measured there.</p>"
    ]
    for name, results in found.items():
        info = results.info
        dates = sorted({c.info["date"] for c in results.comparisons})
        versions = ", ".join(f"{package} {version}" for package, version in info["versions"].items())
        said = f"{info['processor']}, {info['cores']} cores; {dates[0]} to {dates[-1]}; {versions}"
        rows = [
            (g.group, g.peer, f"{g.median:.2f}", f"{g.least:.2f} to {g.most:.2f}", str(g.cells)) for g in gains(results)
        ]
        parts.append(f'<h2 id="{html.escape(name)}">{html.escape(name)}</h2><p>{inline(said)}</p>')
        if rows:
            head = "".join(f"<th>{h}</th>" for h in ("what", "beside", "gain, median", "range", "cells"))
            body = "".join("<tr>" + "".join(f"<td>{inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')
        parts.append(_pictures([("gains by method", heat_map(results)), ("overhead", overhead(results))]))
        tables = "".join(table_html(table) for table in everything(results))
        parts.append(f"<details><summary>All tables of {html.escape(name)}</summary>{tables}</details>")
    return "".join(parts) + "</html>\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and the figures, or with --check say whether the README has those of the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overview", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README is out of date")
    options = parser.parse_args(arguments)
    found = classes()
    before = README.read_text()
    after = updated(before, figures(found), BEGIN, END)
    if options.check:
        sys.stdout.write("up to date\n" if after == before else "README.md is out of date: run this without --check\n")
        return int(after != before)
    README.write_text(after)
    (RESULTS / "index.html").write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
