"""Settings of the process: the only place that reads environment variables. docs/backends.md lists all of them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import GeneratorType
from typing import Any

import torch

BACKENDS = ("native", "triton", "torch")
"""Every backend, in the order in which an untuned operator prefers them."""


def _keep_for_threads(key: str, value: tuple[Any, ...]) -> None:
    """Keep a new object in what torch hands to the threads that it starts for a backward pass.

    Releases of torch before 2.12 take a reference that they never counted, and drop it when the object is replaced.
    """
    # Ours comes first and goes if torch takes its own: an interruption leaves one too many, never one too few.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    before = sys.getrefcount(value)
    torch._C._stash_obj_in_tls(key, value)
    if sys.getrefcount(value) != before:
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(value))


class _Block:
    """One ``with`` block, told from others by identity."""

    __slots__ = ("name", "running")

    def __init__(self, name: str) -> None:
        self.name = name
        self.running: Callable[[], GeneratorType[None, None, None] | None] = lambda: None

    def is_open(self) -> bool:
        """Return whether the generator that opened it still waits for the end of the block.

        It ends by whatever exception there is, KeyboardInterrupt on any of its lines included. A note that it makes of
        its end could be prevented by that.
        """
        generator = self.running()
        return generator is not None and generator.gi_frame is not None


class Choice:
    """A name that ``with`` blocks choose, which may overlap: in threads, in tasks, or left in another order.

    A block is open as long as its generator runs. Nothing is put back, so nothing old can be put back. Threads and
    tasks see their own blocks alone. Autograd runs the backward pass of other devices on threads of its own: to them
    it hands what torch keeps for the thread that asked for the gradients, so the choice is noted there too.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        # Those that an interruption kept from leaving are taken out when they are met.
        self.open: set[_Block] = set()
        self._entered: ContextVar[tuple[_Block, ...]] = ContextVar(key, default=())

    def get(self) -> str | None:
        """Return the name that the innermost open block chose, or None outside of all."""
        if not self.open:
            return None
        for block in (*reversed(self._entered.get()), *reversed(self._handed_over()[1])):
            if block.is_open():
                return block.name
        for block in [*self.open]:
            if not block.is_open():
                self.open.discard(block)
        return None

    def _handed_over(self) -> tuple[int, tuple[_Block, ...]]:
        """Return the thread whose backward pass this one of autograd's runs, and its blocks; else this one and none."""
        me = threading.get_ident()
        if torch._C._is_key_in_tls(self._key):
            thread, blocks = torch._C._get_obj_in_tls(self._key)
            # What this thread noted itself may be of another task.
            if thread != me:
                return thread, blocks
        return me, ()

    def _note(self, *entered: _Block) -> None:
        """Keep the open blocks of this thread or task, and those entered now, for itself and for autograd."""
        # Blocks that ended in another thread or task go here.
        own = (*(b for b in self._entered.get() if b.is_open()), *entered)
        self._entered.set(own)
        thread, blocks = self._handed_over()
        outer = (b for b in blocks if b.is_open() and b not in own)
        _keep_for_threads(self._key, (thread, (*outer, *own)))

    def named(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that chooses a name inside its ``with`` block."""
        block = _Block(name)
        manager = self._holding(block)
        generator = manager.gen
        assert isinstance(generator, GeneratorType)
        block.running = weakref.ref(generator)
        return manager

    @contextlib.contextmanager
    def _holding(self, block: _Block) -> Iterator[None]:
        # At the end of the process Python empties modules, this one's names too, before it closes what is open.
        ends = sys.is_finalizing
        self.open.add(block)
        try:
            self._note(block)
            yield
        finally:
            self.open.discard(block)
            if not ends():
                self._note()


choice = Choice("peftk.backend")
"""The backend that `use_backend` chooses."""


def _check(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{source}: expected one of auto, {', '.join(sorted(BACKENDS))}; got {name!r}")
    return name


def backend() -> str:
    """Return the backend that is asked for: ``auto`` or the name of one."""
    return choice.get() or backend_of_environment()


@functools.cache
def backend_of_environment() -> str:
    """Return the backend that is asked for where no `use_backend` block is open."""
    return _check(os.environ.get("PEFTK_BACKEND") or "auto", "PEFTK_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator on one backend inside a ``with`` block.

    The choice holds in the thread (or asyncio task) that makes it, and in every backward pass that is started inside,
    also where autograd runs it on a thread of its own. Blocks may overlap; the innermost open one decides. A thread
    started inside begins without a choice, as it does with autocast. A named backend that cannot run a call raises and
    says why; ``auto`` restores the automatic choice.

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
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "use_backend: expected to be called outside a compiled function (operators choose their backend "
            "when they run, so the choice made here would be lost); got a call under torch.compile"
        )
    with choice.named(_check(name, "use_backend")):
        yield


def cache_dir() -> Path:
    """Return the folder of the user's own tuned tables; it need not exist."""
    configured = os.environ.get("PEFTK_CACHE_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "peftk"
