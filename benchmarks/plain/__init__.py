"""Every public operator as one writes it in plain PyTorch: what eager mode and torch.compile are timed with.

The file of a family has them in `PLAIN`, by name. Activations are (tokens, features). Arguments have the names and
defaults of the public functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from torch import Tensor

_FAMILIES = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
PLAIN: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    name: formula for family in _FAMILIES for name, formula in family.PLAIN.items()
}
"""Public operator to its formula."""
