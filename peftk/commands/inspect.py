"""``python -m peftk inspect``: what an adapter file or folder holds, whoever wrote it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint.adapted import DOWN
from ..checkpoint.container import CheckpointError, shown
from ..checkpoint.foreign_numbers import alpha_of, written_alphas
from ..checkpoint.peft import CONFIG_NAME, WEIGHTS_NAME, read_config
from ..checkpoint.reader import TensorFile, read_safetensors
from ..checkpoint.recognise import Found, recognise

Row = dict[str, Any]
"""What is said of one module."""

RANKED = (*DOWN, "lora_embedding_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Tensors with a row for every rank."""


def examine(path: Path) -> dict[str, Any]:
    """Return everything that the command says of a file, or of the adapter in a folder, as JSON values.

    Raises:
        CheckpointError: It cannot be read, or is damaged.
    """
    file, config = (path / WEIGHTS_NAME, read_config(path)) if path.is_dir() else (path, None)
    tensors = read_safetensors(file)
    found = recognise({key: tensor.shape for key, tensor in tensors.items()}, tensors.metadata)
    written = written_alphas(tensors.metadata, tensors)
    return {
        "file": str(file),
        "dialect": found.dialect,
        "certain": found.certain,
        "methods": found.methods,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "digests": "agree" if tensors.verified else "none in the file",
        "metadata": sorted(tensors.metadata),
        "problems": found.problems(),
        "modules": [_row(name, one, tensors, config, written) for name, one in found.modules.items()],
    }


def _row(
    name: str, found: Found, tensors: TensorFile, config: dict[str, Any] | None, written: Mapping[str, Any]
) -> Row:
    parts = {part: tensors[f"{name}.{part}"] for part in found.parts}
    alpha = parts.get("alpha", parts.get("lora_alpha"))
    value = None
    if alpha is not None:
        if alpha.numel() != 1:
            raise CheckpointError(
                tensors.path, f"module {shown(name)}: alpha: expected one number, got shape {tuple(alpha.shape)}"
            )
        value = float(alpha)
    elif config is not None:
        value = _of_config(config, name, "alpha", "lora_alpha", "constraint")
    elif written:
        try:
            value = alpha_of(name, rank_of(found) or 1, parts, written)
        except ValueError as error:
            raise CheckpointError(tensors.path, f"module {shown(name)}: {error}") from None
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in parts.values() if part.dim() > 0))
    return {
        "module": name,
        "method": found.method,
        "rank": rank_of(found),
        "alpha": value,
        "dtypes": sorted({str(part.dtype).removeprefix("torch.") for part in parts.values()}),
        "tensors": {part: list(tensor.shape) for part, tensor in parts.items()},
        "norm": norm,
    }


def _of_config(config: dict[str, Any], name: str, *fields: str) -> float | None:
    """Return a number of a configuration for a module; None where a pattern may give it another one."""
    if any(config.get(f"{field}_pattern") for field in fields):
        return None
    value = next((config[field] for field in fields if field in config), None)
    return float(value) if isinstance(value, (int, float)) else None


def rank_of(found: Found) -> int | None:
    """Return the rank of a module's adapter, which its first factor tells, or None where its method has none."""
    for part in RANKED:
        shape = found.parts.get(part)
        if shape:
            return shape[0]
    return None


def show(report: dict[str, Any], console: Any) -> None:
    """Print a report as a table."""
    from rich.table import Table
    from rich.text import Text

    sure = "" if report["certain"] else ", probably"
    who = report["dialect"] or "unknown"
    console.print(Text(f"{report['file']}: {who}{sure}; {' and '.join(report['methods']) or 'no adapter'}"))
    console.print(Text(f"sha256 {report['sha256']}; sha256 of its tensors: {report['digests']}"))
    if report["metadata"]:
        shown = report["metadata"][:6]
        more = f" and {len(report['metadata']) - 6} more" if len(report["metadata"]) > 6 else ""
        console.print(Text(f"metadata: {', '.join(shown)}{more}"))
    table = Table()
    for head in ("module", "method", "rank", "alpha", "dtype", "norm"):
        table.add_column(head, overflow="fold", justify="right" if head in ("rank", "alpha", "norm") else "left")
    for row in report["modules"]:
        numbers = ["-" if row[key] is None else f"{row[key]:g}" for key in ("rank", "alpha")]
        cells = [row["module"], row["method"] or "?", *numbers, " ".join(row["dtypes"]), f"{row['norm']:.4g}"]
        table.add_row(*map(Text, cells))
    console.print(table)
    for problem in report["problems"]:
        console.print(Text(problem, style="yellow"))


def inspect(
    path: Annotated[Path, typer.Argument(help=f"A safetensors file, or a folder with {WEIGHTS_NAME}, {CONFIG_NAME}.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what an adapter file holds: dialect, methods, modules, ranks, alphas, norms, and what is missing."""
    from rich.console import Console

    try:
        report = examine(path)
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    console = Console()
    show(report, console if console.is_terminal else Console(width=120))
