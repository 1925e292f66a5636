"""Record the sources of the functions whose meaning `peftk.integrations` repeats, after they were read.

``python -m tools.fingerprints`` adds those of the installed version of PEFT to `fingerprints.json`. Run it in an
environment of each supported version, look at what is new, and run the tests of the integration there.
"""

from __future__ import annotations

import json

from peftk.integrations.fingerprints import resolve, source_hash
from peftk.integrations.hf_peft import library, tuner_layer


def names() -> list[str]:
    """Return the dotted names of all functions whose meaning is repeated."""
    found: set[str] = set()
    for layer, way in library.ways().items():
        found |= {f"{layer}.forward", *way.copied, *way.copied_by_some}
    return sorted(found)


def main() -> None:
    """Add the hashes of the installed version."""
    known, version = tuner_layer.FINGERPRINTS.known, tuner_layer.FINGERPRINTS.version
    file = tuner_layer.FINGERPRINTS.file
    for name in names():
        try:
            found = source_hash(resolve(name))
        except (AttributeError, ImportError) as error:
            print(f"{name}: {error}")
            continue
        versions = known.setdefault(name, {}).setdefault(found, [])
        if version not in versions:
            print(f"{name}: {found} of {version}")
            versions[:] = sorted({*versions, version})
    file.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
