"""Record the sources of the functions whose meaning `peftk.integrations` repeats, after they were read.

``python -m tools.fingerprints`` adds those of the installed version of each library to its `fingerprints.json`. Run it
in an environment of each supported version, look at what is new, and run the tests of the integration there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from typing import Any

from peftk.integrations.accelerate import LIBRARIES
from peftk.integrations.fingerprints import resolve, source_hash


def names(library: Any) -> list[str]:
    """Return the dotted names of all functions whose meaning is repeated."""
    found: set[str] = set()
    for layer, way in library.ways().items():
        found |= {f"{layer}.forward", *way.copied, *way.copied_by_some}
    return sorted(found)


def add(library: Any) -> None:
    """Add the hashes of the installed version of a library."""
    prints = library.FINGERPRINTS
    for name in names(library):
        try:
            found = source_hash(resolve(name))
        except (AttributeError, ImportError) as error:
            print(f"{name}: {error}")
            continue
        versions = prints.known.setdefault(name, {}).setdefault(found, [])
        if prints.version not in versions:
            print(f"{name}: {found} of {prints.version}")
            versions[:] = sorted({*versions, prints.version})
    prints.file.write_text(json.dumps(dict(sorted(prints.known.items())), indent=1) + "\n")


def main() -> None:
    """Add the hashes of every library that is installed."""
    for name, (package, *_) in LIBRARIES.items():
        if importlib.util.find_spec(name) is not None:
            add(importlib.import_module(f"peftk.integrations.{package}.library"))


if __name__ == "__main__":
    main()
