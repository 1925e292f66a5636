"""The commands of `python -m peftk`: one module a command, with a function of the same name that typer reads.

`COMMANDS` is the list. A module is imported only when its command or the overview is asked for, and imports whatever is
slow (transformers, matplotlib, ...) inside its functions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

COMMANDS = ("doctor", "demo", "bench")


def load(name: str) -> Callable[..., None]:
    """Return the function behind a command."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)
