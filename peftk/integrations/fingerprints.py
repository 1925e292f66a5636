"""Which sources of another library's functions were read before their meaning was repeated here."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def resolve(name: str) -> Any:
    """Return what a dotted name stands for, as ``peft.tuners.lora.layer.Linear.forward``.

    Raises:
        AttributeError: There is no such name.
        ImportError: Its package is not installed.
    """
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if error.name is None or not ".".join(parts[:count]).startswith(error.name):
                raise
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(f"no module named {parts[0]!r}", name=parts[0])


def name_of(cls: type) -> str:
    """Return the dotted name of a class, which `resolve` takes."""
    return f"{cls.__module__}.{cls.__qualname__}"


def source_hash(function: Any) -> str:
    """Return the hash of a function's source text, without what this package has put around it."""
    function = getattr(function, "_peftk_original", function)
    # The text and not its syntax tree, which Python's versions write differently.
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


class Fingerprints:
    """The hashes of known functions of one library, from a file of names, hashes and the versions that have them.

    Args:
        file: A JSON file: ``{dotted name: {hash: [versions]}}``.
        distribution: The name of the library as it is installed.
    """

    def __init__(self, file: Path, distribution: str) -> None:
        self.file, self.distribution = file, distribution
        self.known: dict[str, dict[str, list[str]]] = json.loads(file.read_text())
        self._seen: dict[tuple[str, int], str | None] = {}

    def unknown(self, names: Sequence[str]) -> str | None:
        """Name the first of these functions whose source is not known, and the version of the library, or None."""
        for name in names:
            found = self._unknown(name)
            if found is not None:
                return found
        return None

    def _unknown(self, name: str) -> str | None:
        try:
            function = resolve(name)
        except (AttributeError, ImportError):
            return f"{self.distribution} {self.version} has no {name}"
        # By the function too: somebody may replace it later.
        key = name, id(function)
        if key not in self._seen:
            self._seen[key] = self._compare(name, function)
        return self._seen[key]

    def _compare(self, name: str, function: Any) -> str | None:
        hashes = self.known.get(name, {})
        try:
            found = source_hash(function)
        except (OSError, TypeError):
            return f"the source of {name} cannot be read"
        if found in hashes:
            return None
        versions = sorted({v for names in hashes.values() for v in names})
        return (
            f"{name} of {self.distribution} {self.version} is not one that was read "
            f"(known: {', '.join(versions) or 'none'})"
        )

    @functools.cached_property
    def version(self) -> str:
        """The version of the library that is installed."""
        return version(self.distribution)
