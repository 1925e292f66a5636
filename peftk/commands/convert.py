"""``python -m peftk convert``: an adapter file of one program as the file of another, with nothing lost on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint.adapted import COMPONENTS
from ..models.adapter_source import Source, model_weights, read_source
from ..models.convert import convert as written
from ..models.convert_plan import DIALECTS, Plan, plan_for


def show(source: Source, plan: Plan, console: Any) -> None:
    """Print what becomes of every key."""
    from rich.table import Table
    from rich.text import Text

    how = "restored as it was" if plan.exact else f"written as {DIALECTS[plan.dialect]}"
    methods = " and ".join(sorted({module.method for module in source.modules}))
    count = len(source.modules)
    console.print(Text(f"{source.path}: {source.dialect}, {methods} on {count} modules; {how}"))
    table = Table()
    for head in ("key", "becomes", "note"):
        table.add_column(head, overflow="fold")
    for key, target, note in plan.rows:
        table.add_row(Text(key), Text(target or "-"), Text(note))
    console.print(table)


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A safetensors file, or a folder of PEFT.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; for PEFT, the folder.")],
    to: Annotated[str, typer.Option(help=f"The dialect: {', '.join(DIALECTS)}.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Safetensors files of the model, whose names tell where names with underscores have dots."),
    ] = None,
    component: Annotated[
        str | None, typer.Option(help=f"What modules belong to that do not say: {', '.join(COMPONENTS)}.")
    ] = None,
    original_names: Annotated[
        bool,
        typer.Option(
            "--original-names",
            help="With --model: names as the authors of SDXL, Flux, SD3 and Wan had them; what was one is joined.",
        ),
    ] = False,
    drop: Annotated[list[str] | None, typer.Option(help="Leave out keys of this pattern; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan alone.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Write an adapter in the dialect of another program: PEFT, kohya, LyCORIS, diffusers or ComfyUI."""
    from rich.console import Console

    try:
        read = read_source(source)
        plan = plan_for(
            read,
            to,
            weights=None if model is None else model_weights(model),
            component=component,
            drop=drop or (),
            original=original_names,
        )
        console = Console()
        if not as_json:
            show(read, plan, console if console.is_terminal else Console(width=200))
        found = [] if dry_run else written(read, plan, out, force=force, progressbar=not as_json)
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        rows = [{"key": key, "becomes": target, "note": note} for key, target, note in plan.rows]
        typer.echo(json.dumps({"to": to, "exact": plan.exact, "keys": rows, "compared": dict(found)}, indent=1))
    elif not dry_run:
        worst = max(found, key=lambda one: one[1])
        how = "bit by bit" if worst[1] == 0 else f"to {worst[1]:.1e} of their size at most ({worst[0]})"
        typer.echo(f"{out}: written; the updates of all {len(found)} modules, in float64, are the same {how}")
