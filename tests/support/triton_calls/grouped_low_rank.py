"""Full-size calls of the grouped low-rank product, and what they launch."""

from __future__ import annotations

from collections.abc import Iterator

from . import Call


def calls() -> Iterator[Call]:
    yield from ()


LAUNCHES: dict[str, list[str]] = {}
