"""The pictures of the demos: one method with its loss curves, or all methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"peftk": "#1f6fb4", "Hugging Face PEFT": "#d1742f", "frozen model": "#8a8a8a"}


def draw(path: Path, title: str, losses: Mapping[str, Sequence[float]], milliseconds: Mapping[str, float]) -> None:
    """Write the picture as a PNG.

    Args:
        path: the file to write.
        title: the method and the model.
        losses: the training loss of every step, by arm.
        milliseconds: the median time of a step, by arm.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title)
    for name, values in losses.items():
        style = {"linestyle": (0, (4, 3)), "linewidth": 2.2} if name == "Hugging Face PEFT" else {"linewidth": 1.6}
        steps = range(1, len(values) + 1)
        left.plot(steps, values, color=COLOURS[name], alpha=0.25, linewidth=0.8)
        left.plot(steps, smoothed(values), label=name, color=COLOURS[name], **style)
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    left.set_title("The same batches and first weights; means of steps, faint: each step", fontsize=10)
    left.legend(frameon=False)
    names = list(milliseconds)
    bars = right.bar(names, list(milliseconds.values()), color=[COLOURS[name] for name in names], width=0.6)
    right.bar_label(bars, labels=[f"{value:.0f} ms" for value in milliseconds.values()], padding=2)
    right.set(ylabel="median time of a training step (ms)")
    right.set_title("One step of each in turn", fontsize=10)
    right.margins(y=0.12)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of every value and its neighbours, a tenth of all to both sides together."""
    reach = max(1, len(values) // 20)
    return [sum(part) / len(part) for i in range(len(values)) for part in [values[max(0, i - reach) : i + reach + 1]]]


def draw_all(path: Path, results: Mapping[str, Any]) -> None:
    """Write the picture of all methods as a PNG: accuracy, time of a step and peak memory, one row a method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results["methods"]
    titles = [row["title"] for row in rows]
    places = range(len(rows))
    figure = Figure(figsize=(12.5, 1.9 + 0.46 * len(rows)), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, sharey=True)
    figure.suptitle(f"{results['model']}, {results['steps']} steps of each method")

    right_answers = [100 * row["accuracy"]["peftk"] for row in rows]
    bars = left.barh(places, right_answers, color=COLOURS["peftk"], height=0.6)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # so that the dashed line leaves the figures alone
    left.bar_label(bars, fmt="%.0f %%", padding=5, fontsize=8, bbox=paper)
    before = 100 * results["accuracy"]["before"]
    left.axvline(before, color="#444444", linestyle="--", linewidth=1, label=f"before, the head alone: {before:.0f} %")
    left.set(xlim=(0, 112), xlabel="right answers, held out (%)", xticks=range(0, 101, 20))
    left.set_yticks(list(places), titles)
    left.invert_yaxis()

    _pairs(middle, rows, "of_frozen_step", "{:.2f}x")
    middle.axvline(1, color=COLOURS["frozen model"], linewidth=1, linestyle="--", label="frozen model")
    middle.set(xlabel="time of a step, of the frozen model's")
    small = min(row["peak_mib"]["peftk"] for row in rows) < 10
    _pairs(right, rows, "peak_mib", "{:.1f}" if small else "{:.0f}")
    right.set(xlabel="peak memory of a step, above the model (MiB)")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.savefig(path)


def _pairs(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, form: str) -> None:
    """Draw one figure of both libraries as two bars a method."""
    for offset, name in ((-0.2, "peftk"), (0.2, "Hugging Face PEFT")):
        found = [(place, row[key][name]) for place, row in enumerate(rows) if name in row.get(key, {})]
        if not found:
            continue
        places, values = zip(*found, strict=True)
        bars = axes.barh([p + offset for p in places], values, color=COLOURS[name], height=0.38, label=name)
        axes.bar_label(bars, labels=[form.format(value) for value in values], padding=3, fontsize=7)
    axes.margins(x=0.16)
