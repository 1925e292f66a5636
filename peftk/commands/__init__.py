"""The commands of `python -m peftk`: one module a command, with a function of the same name that typer reads.

`COMMANDS` is the list. A module is imported only when its command is asked for, and imports whatever is slow
(transformers, matplotlib, ...) inside its functions. The overview imports none: torch takes seconds.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path

COMMANDS = ("doctor", "demo", "bench", "inspect", "convert", "merge")


def load(name: str) -> Callable[..., None]:
    """Return the function behind a command."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)


def summary(name: str) -> str:
    """Return the first sentence of what the function behind a command says of itself, without importing it."""
    here = Path(__file__).parent
    for file in (here / f"{name}.py", here / name / "__init__.py"):
        if file.is_file():
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return (ast.get_docstring(node) or "").partition("\n\n")[0]
    return ""
