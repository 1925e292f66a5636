"""What `peftk.accelerate` has done: for each layer whether it is accelerated, by what, and if not, why."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn


class Row(NamedTuple):
    """One layer, or one class of layers.

    Attributes:
        name: The path of the layer in its model, or the name of the class.
        kind: The class, as the library writes it, such as "lora.Linear".
        operator: The operator of `peftk.functional`, or the function of torch, that does most of the work; None where
            the library's own code runs.
        backend: The backend that the operator chose for a few rows of the layer's size; None if that was not asked.
        reason: Why the library's own code runs, or what differs from its results; None if neither.
    """

    name: str
    kind: str
    operator: str | None
    backend: str | None
    reason: str | None

    @property
    def accelerated(self) -> bool:
        """Whether this package's arithmetic runs."""
        return self.operator is not None


class Report(Sequence[Row]):
    """What `peftk.accelerate` has done, one row a layer; `print` groups them, and `restore` undoes it."""

    def __init__(self, title: str, rows: Sequence[Row], undo: Callable[[], int]) -> None:
        self._title, self._rows, self._undo = title, tuple(rows), undo

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    @property
    def accelerated(self) -> int:
        """The number of rows that are accelerated."""
        return sum(row.accelerated for row in self._rows)

    def restore(self) -> int:
        """Give everything its own code back, and return how much had another; 0 the second time.

        Layers that were removed from the model meanwhile are restored too; layers that are new have PEFT's own code.
        """
        return self._undo()

    def __str__(self) -> str:
        groups: dict[tuple[str, str | None, str | None, str | None], list[str]] = {}
        for row in self._rows:
            groups.setdefault(row[1:], []).append(row.name)
        lines = [f"{self._title}: {self.accelerated} of {len(self)} accelerated"]
        table = [
            (str(len(names)), kind, _by(operator, backend), _named(kind, names))
            for (kind, operator, backend, _), names in groups.items()
        ]
        widths = [max(len(line[column]) for line in table) for column in range(3)] if table else []
        for line, (_, _, _, reason) in zip(table, groups, strict=True):
            cells = (line[0].rjust(widths[0]), line[1].ljust(widths[1]), line[2].ljust(widths[2]), line[3])
            lines.append("  " + "  ".join(cells).rstrip())
            if reason is not None:
                lines.append(" " * (widths[0] + 6) + reason)
        return "\n".join(lines)

    __repr__ = __str__


def _by(operator: str | None, backend: str | None) -> str:
    if operator is None:
        return "library's own"
    return operator if backend is None else f"{operator} ({backend})"


def _named(kind: str, names: list[str]) -> str:
    if len(names) > 1:
        return f"{names[0]}, ... {names[-1]}"
    # A class has no path.
    return "" if names[0] == kind else names[0]


def restorer(layers: Sequence[nn.Module], restore: Callable[[nn.Module], bool]) -> Callable[[], int]:
    """Return a function that restores those of some layers that still live, and counts them."""
    # A report that somebody keeps keeps no model.
    kept = [weakref.ref(layer) for layer in layers]

    def undo() -> int:
        return sum(restore(layer) for layer in (ref() for ref in kept) if layer is not None)

    return undo
