"""Tuned tables: which backend was measured to be fastest, by device class, operator and shape bucket.

The tables that ship in ``tuned/<device class>.json`` were written by ``python -m peftk bench --tune``; a
table of the same name in the user's cache folder wins over them cell by cell. What a class has not measured is taken
from the nearest class that has. Nothing is ever timed while a model runs: a cell that nobody has measured is "untuned".
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import settings

logger = logging.getLogger("peftk")

SHIPPED = Path(__file__).parent / "tuned"

Table = dict[str, dict[tuple[Any, ...], dict[str, float]]]

TIE = 1.1
"""Times this close are the same: what differs is the noise. The backend that untuned calls prefer then comes first."""


@functools.cache
def device_class(device_type: str, index: int | None = None) -> str:
    """Name the class of devices that share a tuned table, such as ``cpu-avx2`` or ``cuda-sm90``."""
    if device_type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability().lower()
        amx = torch.cpu._is_amx_tile_supported()
        return "cpu-amx" if amx else f"cpu-{capability}"
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        return f"cuda-sm{major}{minor}"
    return device_type


_CAPABILITIES = ("default", "avx2", "avx512", "amx")
"""Classes of CPUs, each with more than the one before."""


def _place(name: str) -> tuple[str, int] | None:
    """Return the kind of device and where a class stands among those of its kind, or None if it stands nowhere."""
    kind, _, rest = name.partition("-")
    if kind == "cpu" and rest in _CAPABILITIES:
        return kind, _CAPABILITIES.index(rest)
    if kind == "cuda" and rest.startswith("sm") and rest[2:].isdigit():
        return kind, int(rest[2:])
    return None


def nearest(name: str) -> str | None:
    """Return the other class with a table that stands nearest to a class, the lesser one of two; None if there is none.

    Only classes of CPUs are near to each other, and of GPUs.
    """
    here = _place(name)
    found = []
    for folder in (SHIPPED, settings.cache_dir()):
        for path in folder.glob("*.json"):
            place = _place(path.stem)
            if here is not None and place is not None and place[0] == here[0] and path.stem != name:
                found.append((abs(place[1] - here[1]), place[1], path.stem))
    return min(found)[2] if found else None


def power_bucket(*sizes: int) -> tuple[int, ...]:
    """Round every size up to a power of two, and return the exponents."""
    return tuple([(int(size) - 1).bit_length() if size > 0 else -1 for size in sizes])


def cell(args: tuple[Any, ...], bucket: Callable[..., tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the key of a call in a table: the first argument's dtype and the operator's own bucket."""
    return (_dtype_name(args[0].dtype), *bucket(*args))


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(path: Path) -> Table:
    content = json.loads(path.read_text())
    return {
        operator: {(row["dtype"], *row["bucket"]): row["microseconds"] for row in rows}
        for operator, rows in content["operators"].items()
    }


@functools.cache
def tables(name: str) -> dict[str, Table]:
    """Return the tables that a device class goes by, the last one first asked: the nearest class's, then its own.

    Each is the shipped one with the user's cells over it. A table that cannot be read is reported once and left out.
    """
    found: dict[str, Table] = {}
    for owner in (nearest(name), name):
        if owner is None:
            continue
        for folder in (SHIPPED, settings.cache_dir()):
            path = folder / f"{owner}.json"
            if not path.is_file():
                continue
            try:
                read = _read(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                why = f"{type(error).__name__}: {error}"
                logger.warning("tuned table %s is left out: it cannot be read (%s)", path, why)
                continue
            for operator, cells in read.items():
                found.setdefault(owner, {}).setdefault(operator, {}).update(cells)
    return found


@functools.cache
def table(name: str) -> Table:
    """Return what is known of a device class: the cells of `tables`, its own over those of the nearest class."""
    merged: Table = {}
    for one in tables(name).values():
        for operator, cells in one.items():
            merged.setdefault(operator, {}).update(cells)
    return {operator: {key: _ranked(times) for key, times in cells.items()} for operator, cells in merged.items()}


@functools.cache
def cells_of(operator: str, device: torch.device) -> dict[tuple[Any, ...], dict[str, float]] | None:
    """Return what was measured of an operator on a class of devices, by cell, or None if nothing was."""
    return table(device_class(device.type, device.index)).get(operator)


def clear() -> None:
    """Forget the tables, so that the next look-up reads them again."""
    tables.cache_clear()
    table.cache_clear()
    cells_of.cache_clear()


def _ranked(times: dict[str, float]) -> dict[str, float]:
    """Put the backends into the order in which a look-up walks over them: ties by preference, then by time."""
    tie = TIE * min(times.values(), default=0.0)
    return dict(sorted(times.items(), key=lambda item: (0, _order(item[0])) if item[1] <= tie else (1, item[1])))


def _order(backend: str) -> int:
    return settings.BACKENDS.index(backend) if backend in settings.BACKENDS else len(settings.BACKENDS)


def lookup(operator: str, args: tuple[Any, ...], bucket: Callable[..., tuple[Any, ...]]) -> dict[str, float] | None:
    """Return the measured microseconds of each backend for a call, best first, or None if untuned."""
    cells = cells_of(operator, args[0].device)
    return None if cells is None else cells.get(cell(args, bucket))


def measured_on(operator: str, args: tuple[Any, ...], bucket: Callable[..., tuple[Any, ...]]) -> str | None:
    """Return the device class on which the cell of a call was measured, or None if untuned."""
    device = args[0].device
    key = cell(args, bucket)
    owners = [
        owner for owner, one in tables(device_class(device.type, device.index)).items() if key in one.get(operator, {})
    ]
    return owners[-1] if owners else None
