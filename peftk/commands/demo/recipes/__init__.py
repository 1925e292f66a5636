"""The methods that the demos train. A method's file has its `RECIPES`, or says in `ELSEWHERE` where it is shown."""

from __future__ import annotations

import importlib
import pkgutil

from ._recipe import Elsewhere, Method, Sizes, fitting_block

_FILES = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
METHODS: dict[str, Method] = {
    # LoRA first, which is the default and what others are compared with.
    method.name: method
    for file in sorted(_FILES, key=lambda file: not file.__name__.endswith(".lora"))
    for method in getattr(file, "RECIPES", ())
}
ELSEWHERE: dict[str, Elsewhere] = {file.ELSEWHERE.name: file.ELSEWHERE for file in _FILES if hasattr(file, "ELSEWHERE")}

__all__ = ["ELSEWHERE", "METHODS", "Elsewhere", "Method", "Sizes", "fitting_block"]
