"""All methods side by side: each trains with peftk to the end, and its step is timed beside its peers'."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..._version import __version__
from . import training
from .contest import Limits, contest
from .experts import expert_steps
from .plots import draw_all
from .recipes import Method
from .training import FROZEN, OURS, PEFT, Task, with_trained_head

# The peers are there for the time of a step: these many steps, of Hugging Face PEFT at most these many seconds of them.
PEER_STEPS = 12
PEFT_SECONDS = 12.0
COMPARED = 64


def _frozen_seconds(task: Task) -> float:
    """Return the time of one step of the frozen model."""
    arm = training.make_arm(FROZEN, training.frozen_copy(task.model, task.targets), 0.0, 3)
    part = task.data.take(slice(task.batch))
    for _ in range(3):
        training.step(arm, part)
    return min(arm.seconds)


def _steps(method: Method, steps: int) -> int:
    """Return the steps of peftk for one method, with those of the experts that it mixes."""
    return steps + (method.experts and method.experts * expert_steps(method, steps))


def estimate(task: Task, methods: list[Method], steps: int, compare: bool) -> float:
    """Return about how many seconds `run_all` will take on this machine, from one measured step of the frozen model.

    An adapted step costs up to half as much again, Hugging Face PEFT's several times as much, and an evaluation a third
    of a step an example batch.
    """
    second = _frozen_seconds(task)
    evaluated = (len(task.held_out.labels) + 3 * COMPARED) / task.batch / 3
    peers = (5 + 1) * min(PEER_STEPS, steps) if compare else 0
    head = (len(task.data.labels) + len(task.held_out.labels)) / task.batch / 3
    rows = sum(1.5 * _steps(method, steps) + peers + evaluated for method in methods)
    return second * (rows + head)


@contextlib.contextmanager
def _progress(console: Any, total: int) -> Iterator[Any]:
    """Yield a function that shows the name of what runs and wraps the numbers of its steps."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        line = bar.add_task("", total=total)

        def follow(name: str, numbers: Iterable[Any]) -> Iterator[Any]:
            bar.update(line, description=name)
            for number in numbers:
                yield number
                bar.advance(line)

        yield follow


def run_all(
    task: Task, methods: list[Method], steps: int, output: Path, seed: int, compare: bool, console: Any
) -> dict[str, Any]:
    """Do the work and return what is printed and saved."""
    begin = time.perf_counter()
    console.print(
        f"[bold]{task.name}[/]: {task.question} {len(task.data.labels)} examples to train on, "
        f"{len(task.held_out.labels)} held out."
    )
    seconds = estimate(task, methods, steps, compare)
    text = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{max(5, 5 * round(seconds / 5))} seconds"
    console.print(f"{len(methods)} methods, {steps} steps each: about {text} on this machine.", highlight=False)
    task, before = with_trained_head(task)
    console.print(f"  before, with the head trained alone: {before:.1%} right", highlight=False)
    peers = min(PEER_STEPS, steps)
    limits = Limits(steps, peers, PEFT_SECONDS, peers, COMPARED)
    rows = []
    with _progress(console, sum(_steps(method, steps) for method in methods)) as follow:
        for method in methods:

            def track(numbers: Iterable[Any], name: str = method.title) -> Iterator[Any]:
                return follow(name, numbers)

            row = contest(task, method, limits, output / method.name, seed, compare, track)
            rows.append(row)
            console.print(
                f"  {row['title']}: {row['accuracy'][OURS]:.1%} right, {row['step_ms'][OURS]:.0f} ms a step "
                f"({row['seconds']:.0f} s)",
                highlight=False,
            )
    return {
        "model": task.name,
        "steps": steps,
        "accuracy": {"before": before},
        "examples": {"train": len(task.data.labels), "held_out": len(task.held_out.labels)},
        "versions": {"peftk": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
        "methods": rows,
        "seconds": time.perf_counter() - begin,
    }


def _peers(row: dict[str, Any], key: str, form: str) -> list[str]:
    """Return one figure of peftk and of Hugging Face PEFT, a dash where it was not measured."""
    figures = row.get(key, {})
    return [form.format(figures[name]) if name in figures else "-" for name in (OURS, PEFT)]


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}" if value else "0"


def _count(value: int) -> str:
    return f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.1f}k"


def show_all(results: dict[str, Any], picture: Path, figures: Path, console: Any) -> None:
    """Print the results as one table with a few notes, and draw the picture."""
    from rich import box
    from rich.table import Table

    rows = results["methods"]
    # Narrow enough for a terminal of 80 columns.
    table = Table(
        title=f"{len(rows)} methods on {results['model']}, {results['steps']} steps each",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    table.add_column("", no_wrap=True)
    headings = (
        "trained\nparams",
        "right",
        "step\nms",
        "of\nfrozen",
        "HF\nPEFT",
        "peak\nMiB",
        "HF\nPEFT",
        "merged",
        "in HF\nPEFT",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    empty = [""] * (len(headings) - 2)
    table.add_row("before: head alone", "", f"{results['accuracy']['before']:.1%}", *empty, end_section=True)
    notes: dict[str, int] = {}
    for row in rows:
        mark = ""
        if row["apart"]:
            mark = "*" * notes.setdefault(row["apart"], len(notes) + 1)
        ratio, other = _peers(row, "of_frozen_step", "{:.2f}x")
        peak, their_peak = _peers(row, "peak_mib", "{:.0f}" if row["peak_mib"][OURS] >= 10 else "{:.1f}")
        table.add_row(
            row["title"] + mark,
            _count(row["parameters"]["trainable"]),
            f"{row['accuracy'][OURS]:.1%}",
            f"{row['step_ms'][OURS]:.0f}" if row["step_ms"][OURS] >= 20 else f"{row['step_ms'][OURS]:.1f}",
            ratio,
            other,
            peak,
            their_peak,
            _small(row["difference"].get("merged")),
            _small(row["difference"].get(f"read by {PEFT}")),
        )
    console.print(table)
    for note, number in notes.items():
        console.print(f"{'*' * number} {note}.")
    for note in (
        "Before: the classifier trained alone, to convergence, on the frozen model. Every method starts from there.",
        "Of frozen: the median step as a multiple of the frozen model's, each timed in turn on the same batch; beside "
        "it the same of Hugging Face PEFT.",
        "Peak: the most that torch's allocator held during one step, above the model itself; beside it the same of "
        "Hugging Face PEFT.",
        "Merged, in HF PEFT: the largest relative difference of the logits when the adapter is merged, and when "
        "Hugging Face PEFT reads its file.",
    ):
        console.print(note, highlight=False)
    for row in rows:
        if row["note"]:
            console.print(f"{row['note']}.")
        if len(row["adapts"]) < max(len(other["adapts"]) for other in rows):
            console.print(
                f"{row['title']} adapts {', '.join(row['adapts'])} only: it has no form for the other layers."
            )
    rates = ", ".join(f"{row['method']} {row['rate']:g}" for row in rows)
    console.print(f"Learning rates, not tuned alike (see methods.py): {rates}.", highlight=False)
    draw_all(picture, results)
    console.print(f"figures: {figures}   picture: {picture}")
    console.print(f"took {results['seconds']:.0f} s")
