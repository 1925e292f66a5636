"""``python -m peftk bench``: time every operator on every backend, and write the tuned table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .._version import __version__
from ..runtime import registry, settings, timings
from ..testing.calls import KINDS, Call, operators, sweep
from ..testing.timing import Weave

CLEAR = 1.5
"""A backend that is faster by this factor wins a cell of the tuned table without further samples."""

LONGEST_PRODUCT = 0.5
"""Seconds that the product with the dense weight may take for a call to be timed at all."""


@dataclass
class Measurement:
    """What was found out about one call.

    Attributes:
        call: the call.
        bucket: its bucket in the tuned table.
        reasons: backend to the reason why it was not timed.
        errors: backend to the relative error against float64.
        microseconds: backend to the shortest time of a call, which other programs disturb least.
        rounds: the number of samples of each backend.
    """

    call: Call
    bucket: tuple[Any, ...]
    reasons: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    microseconds: dict[str, float] = field(default_factory=dict)
    rounds: int = 0


@torch.no_grad()
def measure(
    call: Call, device: str, seconds: float, least: int = 5, most: int = 200, decided: float | None = None
) -> Measurement:
    """Check a call on every backend against float64, then time the backends in turns.

    Args:
        call: what to time.
        device: where.
        seconds: how long to spend on the samples.
        least: the smallest number of samples.
        most: the largest.
        decided: stop after the least number if one backend is faster than every other one by this factor.
    """
    arguments = call.arguments(device)
    found = Measurement(call, tuple(registry.OPERATORS[call.operator].bucket(*arguments)))
    arms = {}
    truth = call.truth(arguments)
    for backend in settings.BACKENDS:
        if reason := call.reason(backend, arguments):
            found.reasons[backend] = reason
            continue
        arm = call.bind(backend, arguments)
        found.errors[backend] = call.error(arm(), truth)
        if not found.errors[backend] <= call.limit:
            found.reasons[backend] = f"void: error {found.errors[backend]:.1e} is above {call.limit:.1e}"
            continue
        arms[backend] = arm
    if arms:
        weave = Weave(arms, device)
        rest = weave.rounds_within(seconds, least, most) - least
        if decided and _is_decided(weave.run(least), decided):
            rest = 0
        samples = weave.run(rest if decided else least + rest)
        found.rounds = len(next(iter(samples.values())))
        found.microseconds = {backend: 1e6 * min(times) for backend, times in samples.items()}
    return found


def _is_decided(samples: dict[str, list[float]], factor: float) -> bool:
    fastest, *others = sorted(map(min, samples.values()))
    return not others or others[0] > factor * fastest


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Return about how many operations a second a dense product reaches, from a small one."""
    size = 256
    a = torch.ones(size, size, device=device, dtype=dtype)
    weave = Weave({"product": lambda: a @ a}, device)
    return 2 * size**3 / min(weave.run(3)["product"])


def choose_calls(operators: Iterable[str], quick: bool, device: str) -> Iterator[Call]:
    """Yield the calls to time, without those whose dense product alone would take too long on this device."""
    grid: dict[str, Any] = {}
    if quick:
        grid = {
            "tokens": (32, 512),
            "widths": ((384, 384), (1024, 1024)),
            "blocks": (8, 32),
            "ranks": (16,),
            "factors": (8,),
        }
    for dtype in (torch.float32, torch.bfloat16):
        rate = product_rate(device, dtype)
        for operator in operators:
            for call in sweep(operator, dtype=dtype, **grid):
                if call.product_flops / rate <= LONGEST_PRODUCT:
                    yield call


def cells_in(path: Path) -> set[tuple[Any, ...]]:
    """Return operator, dtype and bucket of every cell of a tuned table; of none if there is no such file."""
    if not path.is_file():
        return set()
    rows = json.loads(path.read_text())["operators"]
    return {(operator, row["dtype"], *row["bucket"]) for operator, cells in rows.items() for row in cells}


def cell_of(call: Call, device: str) -> tuple[Any, ...]:
    """Return operator, dtype and bucket of a call, as `cells_in` has them."""
    bucket = registry.OPERATORS[call.operator].bucket(*call.arguments(device))
    return call.operator, str(call.dtype).removeprefix("torch."), *bucket


def write_table(path: Path, device_class: str, measurements: Iterable[Measurement]) -> int:
    """Write measurements into a tuned table, over the cells that are there already, and return their number.

    The file is replaced as a whole, so that a reader never sees half of it.
    """
    operators: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    if path.is_file():
        for operator, rows in json.loads(path.read_text())["operators"].items():
            operators[operator] = {(row["dtype"], *row["bucket"]): row for row in rows}
    written = 0
    for found in measurements:
        if not found.microseconds:
            continue
        dtype = str(found.call.dtype).removeprefix("torch.")
        times = {backend: round(us, 2) for backend, us in found.microseconds.items()}
        row = {"dtype": dtype, "bucket": list(found.bucket), "microseconds": times}
        cell = (dtype, *found.bucket)
        operators.setdefault(found.call.operator, {})[cell] = row
        written += 1
    content = {
        "device": device_class,
        "versions": {"peftk": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "operators": {
            name: [cells[key] for key in sorted(cells, key=lambda k: (k[0], *map(int, k[1:])))]
            for name, cells in sorted(operators.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(_dump(content))
    os.replace(temporary, path)
    timings.clear()
    return written


def _dump(content: dict[str, Any]) -> str:
    # One line a cell: the table lives in version control.
    rest = json.dumps({key: value for key, value in content.items() if key != "operators"}, indent=1)
    blocks = (
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for name, rows in content["operators"].items()
    )
    return rest.removesuffix("\n}") + ',\n "operators": {\n' + ",\n".join(blocks) + "\n }\n}\n"


def _size(call: Call) -> str:
    return str(call).removeprefix(f"{call.operator}-")


def show(measurements: Iterable[Measurement], console: Any) -> None:
    """Print one table for each operator, the error of every backend beside its time."""
    from rich.table import Table

    by_operator: dict[str, list[Measurement]] = {}
    for found in measurements:
        by_operator.setdefault(found.call.operator, []).append(found)
    for operator, rows in by_operator.items():
        backends = [b for b in settings.BACKENDS if any(b in row.errors for row in rows)]
        table = Table(title=operator, title_justify="left")
        table.add_column("call", no_wrap=True, min_width=max(len(_size(row.call)) for row in rows))
        for backend in backends:
            table.add_column(f"{backend}\nus", justify="right", no_wrap=True)
            table.add_column("error", justify="right", style="dim", no_wrap=True)
        table.add_column("torch /\nfastest", justify="right", no_wrap=True)
        table.add_column("N", justify="right", style="dim", no_wrap=True)
        for row in rows:
            cells = [_size(row.call)]
            fastest = min(row.microseconds, key=row.microseconds.__getitem__, default=None)
            for backend in backends:
                us = row.microseconds.get(backend)
                text = "-" if us is None else f"{us:.1f}"
                if backend in row.reasons and row.reasons[backend].startswith("void"):
                    text = "[red]void[/]"
                cells.append(f"[green]{text}[/]" if backend == fastest else text)
                cells.append(f"{row.errors[backend]:.1e}" if backend in row.errors else "-")
            torch_us = row.microseconds.get("torch")
            cells.append(f"{torch_us / row.microseconds[fastest]:.2f}x" if torch_us and fastest else "-")
            table.add_row(*cells, str(row.rounds))
        console.print(table)


def bench(
    operator: Annotated[
        list[str] | None, typer.Option(help="Only this operator, forward and backward; may be repeated.")
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Write the tuned table that operators choose by.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Where --tune writes; default: the table of this device in the cache folder.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes and few samples.")] = False,
    minutes: Annotated[float, typer.Option(help="How long --tune may take; --resume goes on from there.", min=0)] = 15,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the cells that --tune has written before.")] = False,
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
) -> None:
    """Time every operator on every backend, the error against float64 beside it."""
    from rich.console import Console
    from rich.progress import track

    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    if output is not None and not tune:
        raise typer.BadParameter("expected --tune beside it; got no --tune", param_hint="--output")
    if resume and not tune:
        raise typer.BadParameter("expected --tune beside it; got no --tune", param_hint="--resume")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(
            f"expected a device of this machine; got {device!r}: {reason}", param_hint="--device"
        ) from error
    names = operator or list(KINDS)
    known = {one for kind in KINDS for one in operators(kind)}
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"expected one of {', '.join(KINDS)}; got {name!r}", param_hint="--operator")
    wanted = [one for name in names for one in ((name,) if name.endswith("_backward") else operators(name))]
    device_class = timings.device_class(target.type, target.index)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    console.print(
        f"peftk {__version__}, torch {torch.__version__}, {device_class}, {torch.get_num_threads()} threads, "
        f"load {load:.1f}"
    )
    if load > cores / 2:
        console.print(f"[yellow]The machine is busy (load {load:.1f} on {cores} cores): do not trust these times.[/]")
    calls = list(choose_calls(wanted, quick, device))
    path = output or settings.cache_dir() / f"{device_class}.json"
    known_cells = cells_in(path) if resume else set()
    measurements: list[Measurement] = []
    written = first = left = 0
    end = time.monotonic() + 60 * minutes
    for at, call in enumerate(track(calls, "timing", console=console, disable=not console.is_terminal)):
        if tune and time.monotonic() > end:
            left = len(calls) - at
            break
        if not known_cells or cell_of(call, device) not in known_cells:
            how: dict[str, Any] = {"decided": CLEAR} if tune else {}
            measurements.append(measure(call, device, *((0.02, 3) if quick else (0.15, 5)), **how))
        # After every operator, so that an interruption of these long minutes loses one only.
        if tune and at + 1 < len(calls) and calls[at + 1].operator != call.operator:
            written += write_table(path, device_class, measurements[first:])
            first = len(measurements)
    if tune:
        written += write_table(path, device_class, measurements[first:])
    show(measurements, console)
    if tune:
        console.print(f"{written} cells written to {path}", soft_wrap=True)
    if left:
        console.print(f"[yellow]{left} of {len(calls)} calls are left; --resume measures them.[/]")
