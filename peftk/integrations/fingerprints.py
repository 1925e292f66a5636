"""Which sources of another library's functions were read before their meaning was repeated here."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


@functools.cache
def _place(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the module of a dotted name, which is imported, and the attributes below it."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            continue
        return module, tuple(parts[count:])
    raise ModuleNotFoundError(f"no module named {parts[0]!r}", name=parts[0])


def resolve(name: str) -> Any:
    """Return what a dotted name stands for now, as ``peft.tuners.lora.layer.Linear.forward``.

    Raises:
        AttributeError: There is no such name.
        ImportError: Its package is not installed.
    """
    module, parts = _place(name)
    found: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in parts:
        found = getattr(found, part)
    return found


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
        self._seen: dict[str, tuple[Any, str | None]] = {}

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
        # A layer asks in every call: somebody may replace the function later.
        known, found = self._seen.get(name, (None, None))
        if known is not function:
            found = self._compare(name, function)
            self._seen[name] = function, found
        return found

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


# A compiler cannot follow this through imports and sources: it takes the answer of the time of compiling. That is what
# torch.compiler.assume_constant_result notes, which would import half of torch for it.
vars(Fingerprints.unknown)["_dynamo_marked_constant"] = True
