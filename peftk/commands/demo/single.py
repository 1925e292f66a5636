"""The demo of one method: every arm trains to the end, and one table says how they compare."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from ..._version import __version__
from .contest import Limits, contest
from .plots import draw
from .recipes import Method
from .training import PEFT, Task, with_trained_head

COMPARED = 128
# Enough for a median.
FROZEN_STEPS = 32
# More of Hugging Face PEFT's steps than this would make the reader wait beyond three minutes; BOFT is the case.
PEFT_SECONDS = 75.0


def run(task: Task, method: Method, steps: int, output: Path, seed: int, compare: bool, console: Any) -> dict[str, Any]:
    """Do the work and return what is printed and saved."""
    from rich.progress import track

    begin = time.perf_counter()
    console.print(
        f"[bold]{task.name}[/], {method.title}: {task.question} {len(task.data.labels)} examples to train on, "
        f"{len(task.held_out.labels)} held out."
    )
    console.print("training the head alone on the frozen model, to convergence")
    task, before = with_trained_head(task)

    def progress(numbers: Any) -> Any:
        label = f"training {method.name}, beside its peers" if compare else f"training {method.name}"
        return track(numbers, label, console=console, disable=not console.is_terminal)

    limits = Limits(steps, steps, PEFT_SECONDS, min(FROZEN_STEPS, steps), COMPARED)
    results = contest(task, method, limits, output / "adapter", seed, compare, progress)
    results["accuracy"] = {"before": before} | results["accuracy"]
    results |= {
        "model": task.name,
        "classes": list(task.classes),
        "examples": {"train": len(task.data.labels), "held_out": len(task.held_out.labels)},
        "versions": {"peftk": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
        "seconds": time.perf_counter() - begin,
    }
    draw(output / "demo.png", f"{method.title} on {task.name}", results["losses"], results["step_ms"])
    return results


def show(results: dict[str, Any], output: Path, console: Any) -> None:
    """Print the results as one table and a few lines."""
    from rich.table import Table

    table = Table(title=f"{results['title']} on {results['model']}, {results['steps']} steps")
    for heading in ("", "accuracy", "step (median)", "of the frozen step", "peak memory"):
        table.add_column(heading, justify="right" if heading else "left")
    accuracy = results["accuracy"]
    table.add_row("before: the head alone", f"{accuracy['before']:.1%}", "", "", "")
    for name, milliseconds in results["step_ms"].items():
        ratio = f"{results['of_frozen_step'][name]:.2f}x" if "of_frozen_step" in results else "not measured"
        right = f"{accuracy[name]:.1%}" if name in accuracy else ""
        table.add_row(name, right, f"{milliseconds:.0f} ms", ratio, f"{results['peak_mib'][name]:.0f} MiB")
    console.print(table)
    console.print("Peak memory: the most that torch's allocator held during one step, above the model itself.")
    trainable, total = results["parameters"]["trainable"], results["parameters"]["all"]
    console.print(
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}",
        highlight=False,
    )
    settings = ", ".join(f"{name}={value!r}" for name, value in results["settings"].items())
    console.print(f"settings: {settings}; learning rate {results['rate']:g}", highlight=False)
    if PEFT not in results["step_ms"]:
        console.print(f"{PEFT}: not measured (not installed, or --no-compare).")
    elif len(results["losses"][PEFT]) < results["steps"]:
        taken = len(results["losses"][PEFT])
        console.print(f"{PEFT} took {taken} steps only: {PEFT_SECONDS:.0f} seconds were over.")
    for note in filter(None, (results["apart"], results["note"])):
        console.print(f"Note: {note}.")
    if "largest_loss_gap" in results:
        console.print(f"largest gap between the two loss curves: {results['largest_loss_gap']:.1e}")
    for name, found in results["difference"].items():
        console.print(f"logits of the trained adapter, {name}: largest relative difference {found:.1e}")
    console.print(
        f"adapter: {results['adapter']}   figures: {output / 'results.json'}   picture: {output / 'demo.png'}"
    )
    console.print(f"took {results['seconds']:.0f} s")
