"""Operators without the Python that torch has around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def bare(operator: Any) -> Callable[..., Any]:
    """Return what an operator of torch calls: less Python for a call that takes some microseconds."""
    found: Callable[..., Any] = getattr(operator, "_op", operator)
    return found
