"""The picture of the demo: loss curves of both libraries and the time of a step beside the frozen model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

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
        left.plot(range(1, len(values) + 1), values, label=name, color=COLOURS[name], **style)
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    left.set_title("The same batches, the same first weights", fontsize=10)
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
