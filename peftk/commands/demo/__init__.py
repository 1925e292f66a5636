"""`python -m peftk demo`: adapt a real model to a real task, beside Hugging Face PEFT and the frozen model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .recipes import ELSEWHERE, METHODS

# X-LoRA has fewer, because its experts take some of the time.
STEPS = {"one": 80, "second": 40, "mixed": 60, "all": 60, "images": 200}
SECOND = "loha"
"""What the demo trains after LoRA, where no method is named: one for which the kernels matter."""


def _check(method: str | None, steps: int | None, output: Path) -> None:
    if method in ELSEWHERE:
        raise typer.BadParameter(ELSEWHERE[method].why, param_hint="--method")
    if method is not None and method not in METHODS:
        raise typer.BadParameter(f"expected one of {', '.join(METHODS)}; got {method!r}", param_hint="--method")
    if steps is not None and steps < 2:
        raise typer.BadParameter(f"expected at least 2; got {steps}", param_hint="--steps")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink()
    except OSError as error:
        raise typer.BadParameter(
            f"expected a folder to write to; got {str(output)!r}: {error}", param_hint="--output"
        ) from error


def demo(
    method: Annotated[
        str | None, typer.Option(help=f"Which method (default: lora, then {SECOND}): {', '.join(METHODS)}.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="All methods side by side, in one table and one picture.")
    ] = False,
    images: Annotated[
        bool, typer.Option("--images", help="The methods for convolutions, on a ConvNet that reads digits.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or name of a transformers text encoder; by default all-MiniLM-L6-v2."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help=f"Training steps ({STEPS['one']}, {STEPS['second']} of the second method, X-LoRA {STEPS['mixed']}; "
            f"{STEPS['all']} with --all; {STEPS['images']} for images)."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for adapters, results and picture.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Decides the first weights and the order of the batches.")] = 0,
    compare: Annotated[bool, typer.Option(help="Run Hugging Face PEFT and the frozen model beside it.")] = True,
) -> None:
    """Train, merge, save and reload adapters on a real model and a real task."""
    _check(method, steps, output)
    if every and method is not None:
        raise typer.BadParameter("expected either --all or a method", param_hint="--method")
    if images and model is not None:
        raise typer.BadParameter("the demo on images trains its own ConvNet", param_hint="--model")
    from . import text

    text.need("matplotlib")
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    if images or every:
        _side_by_side(method, images, model, steps, output, seed, compare, console)
        return
    from . import single

    task = text.make_task(model, seed)
    for name in (method,) if method else ("lora", SECOND):
        chosen = METHODS[name]
        folder = output if name != SECOND or method else output / SECOND
        folder.mkdir(exist_ok=True)
        usual = STEPS["mixed" if chosen.experts else "one" if folder is output else "second"]
        found = single.run(task, chosen, steps or usual, folder, seed, compare, console)
        (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")
        single.show(found, folder, console)


def _side_by_side(
    method: str | None,
    images: bool,
    model: str | None,
    steps: int | None,
    output: Path,
    seed: int,
    compare: bool,
    console: Any,
) -> None:
    from . import table

    name = "images" if images else "all"
    chosen = list(METHODS.values())
    if images:
        from . import images as pictures

        chosen = [m for m in chosen if pictures.applies(m)]
        names = [m.name for m in chosen]
        if method is not None and method not in names:
            raise typer.BadParameter(
                f"expected a method for the ConvNet, one of {', '.join(names)}; got {method!r}", param_hint="--method"
            )
        chosen = [m for m in chosen if method in (None, m.name)]
        task = pictures.make_task(seed)
    else:
        from . import text

        task = text.make_task(model, seed)
    results = table.run_all(task, chosen, steps or STEPS[name], output / name, seed, compare, console)
    figures = output / f"{name}.json"
    figures.write_text(json.dumps(results, indent=2) + "\n")
    table.show_all(results, output / f"{name}.png", figures, console)
