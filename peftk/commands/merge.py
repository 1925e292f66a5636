"""``python -m peftk merge``: a model with adapters merged into its files, one tensor after the other."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..models.base_files import read_base
from ..models.merge_files import Merge, merge_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def show(done: Merge, out: Path, console: Any) -> None:
    """Print what was written, and the layers whose update rounding took most of."""
    from rich.table import Table
    from rich.text import Text

    console.print(
        Text(f"{out}: {done.tensors} tensors, {len(done.lost)} of them merged, {len(done.replaced)} replaced")
    )
    table = Table()
    table.add_column("layer", overflow="fold")
    table.add_column("lost to rounding", justify="right")
    worst = sorted(done.lost.items(), key=lambda one: -one[1])
    for path, lost in worst[:10]:
        table.add_row(Text(path), f"{lost:.2%}")
    console.print(table)
    if len(worst) > 10:
        console.print(Text(f"and {len(worst) - 10} more layers, which lost less; --json has all"))


def _with_weight(text: str) -> tuple[str, float]:
    """Return the adapter and the weight that `--also` names."""
    path, _, number = text.rpartition("=")
    if not path or (os.path.exists(text) and not os.path.exists(path)):
        return text, 1.0
    if os.path.exists(text):
        raise ValueError(f"also: {text!r} and {path!r} are both there; write {text + '=1'!r} or ./{text}=WEIGHT")
    try:
        return path, float(number)
    except ValueError:
        raise ValueError(f"also: expected ADAPTER or ADAPTER=WEIGHT with a number, got {text!r}") from None


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The folder of a model of transformers or diffusers.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder of PEFT, or a file of another program.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    weight: Annotated[float, typer.Option(help="What the scale of ADAPTER is multiplied by.")] = 1.0,
    also: Annotated[
        list[str] | None, typer.Option(help="A further adapter, or ADAPTER=WEIGHT; may be repeated.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Of what is written: {', '.join(DTYPES)}.")] = None,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Do not refuse weights that are not finite.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder that is at OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Write a model with adapters merged into it, without loading the model."""
    from rich.console import Console

    adapters = [(adapter, weight)]
    try:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        for text in also or []:
            adapters.append(_with_weight(text))
        done = merge_files(
            read_base(base),
            adapters,
            out,
            dtype=None if dtype is None else DTYPES[dtype],
            safe_merge=not unsafe,
            force=force,
            progressbar=not as_json,
        )
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        # JSON has no infinities, which --unsafe may leave.
        lost = {path: part if math.isfinite(part) else None for path, part in done.lost.items()}
        typer.echo(json.dumps({"tensors": done.tensors, "lost": lost, "replaced": done.replaced}, indent=1))
        return
    console = Console()
    show(done, out, console if console.is_terminal else Console(width=120))
