"""The table of methods, layers and versions in docs/accelerate.md: ``python -m tools.accelerate_table [--check]``.

A class of layers is accelerated in a version if every function whose meaning is repeated was read in that version.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peftk.integrations.adapterhub import library as adapterhub
from peftk.integrations.hf_peft import library as hf_peft
from peftk.integrations.lycoris import library as lycoris

from .support_table import run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "accelerate.md"
BEGIN, END = "<!-- accelerate table: begin -->", "<!-- accelerate table: end -->"


def table() -> str:
    """Return the tables of all libraries in Markdown."""
    return "\n\n".join(_table(library) for library in (hf_peft, lycoris, adapterhub))


def _table(library: Any) -> str:
    known = library.FINGERPRINTS.known
    versions = sorted({v for hashes in known.values() for found in hashes.values() for v in found})
    lines = [f"| method | class of {library.SHOWN} | {' | '.join(versions)} |", "|---|---|" + "---|" * len(versions)]
    for name, way in sorted(library.ways().items(), key=lambda item: (item[1].method, item[0])):
        entries = []
        for version in versions:
            have = {
                f: any(version in found for found in known.get(f, {}).values())
                for f in (*way.copied, f"{name}.forward")
            }
            there = have[f"{name}.forward"]
            own = f"{library.SHOWN}'s own" if there else "no such class"
            entries.append("accelerated" if all(have.values()) else own)
        _, _, where, *_ = name.split(".")
        lines.append(f"| {way.method} | `{where}.{name.rpartition('.')[2]}` | {' | '.join(entries)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Write the table, or with --check say whether it is up to date."""
    return run("tools.accelerate_table", __doc__, PAGE, table, BEGIN, END, arguments)


if __name__ == "__main__":
    sys.exit(main())
