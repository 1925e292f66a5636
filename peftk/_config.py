"""Settings of the process: the only place that reads environment variables. docs/backends.md lists all of them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

BACKENDS = ("native", "triton", "torch")
"""Every backend, in the order in which an untuned operator prefers them."""

_override: str | None = None


def _check(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{source}: expected one of auto, {', '.join(sorted(BACKENDS))}; got {name!r}")
    return name


def backend() -> str:
    """Return the backend that is asked for: ``auto`` or the name of one."""
    return _override or _backend_from_environment()


@functools.cache
def _backend_from_environment() -> str:
    return _check(os.environ.get("PEFTK_BACKEND") or "auto", "PEFTK_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator on one backend inside a ``with`` block.

    The choice is global to the process, as ``torch.backends`` settings are, because autograd may run the
    backward pass on another thread. A named backend that cannot run a call raises and says why; ``auto``
    restores the automatic choice.

    Args:
        name: ``"auto"``, ``"torch"``, ``"native"`` or ``"triton"``.

    Raises:
        ValueError: if the name is unknown.
        RuntimeError: inside a compiled function, where the choice would be ignored silently.

    Example:
        >>> import peftk, torch
        >>> with peftk.use_backend("torch"):
        ...     y = peftk.functional.block_rotate(torch.ones(2, 4), torch.eye(2).expand(2, 2, 2))
    """
    global _override
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "use_backend: expected to be called outside a compiled function (operators choose their backend "
            "when they run, so the choice made here would be lost); got a call under torch.compile"
        )
    before, _override = _override, _check(name, "use_backend")
    try:
        yield
    finally:
        _override = before


def cache_dir() -> Path:
    """Return the folder of the user's own tuned tables; it need not exist."""
    configured = os.environ.get("PEFTK_CACHE_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "peftk"
