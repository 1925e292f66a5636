"""Memory of one step on the CPU: what it keeps for its backward pass, and what it holds at its peak."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def saved_bytes(step: Callable[[], object], owned: Iterable[Tensor]) -> int:
    """Return the bytes that a step keeps for its backward pass.

    Args:
        step: runs the step.
        owned: tensors that exist without it (inputs, parameters); they are not counted.
    """
    known = {t.untyped_storage().data_ptr() for t in owned}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            # An address is only unique while its owner lives.
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Silence what is not written by Python: the profiler's two lines of its own, which no setting turns off."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _allocations(step: Callable[[], object]) -> list[int]:
    """Return what torch's allocator handed out during a step, in order, and as negative numbers what it took back."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with warnings.catch_warnings(), _without_stderr():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]


def peak_bytes(step: Callable[[], object], owned: Iterable[Tensor]) -> int:
    """Return the largest number of bytes that torch's allocator held during a step, above what it held before.

    Args:
        step: runs the step.
        owned: tensors whose gradients are dropped first: one that is left from the last step would be freed in this
            one, and hide as much of its peak.
    """
    for tensor in owned:
        tensor.grad = None
    gc.collect()
    held = peak = 0
    for size in _allocations(step):
        held += size
        peak = max(peak, held)
    return peak


def largest_bytes(step: Callable[[], object]) -> int:
    """Return the size of the largest tensor that a step makes, those inside operators included."""
    return max(_allocations(step), default=0)
