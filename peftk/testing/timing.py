"""Interleaved timing: every arm is timed once in every round, so that noise hits all of them alike.

Two programs timed one after another on a shared machine are compared with its load at two different times. Here the
arms of a comparison take turns, in a new random order every round (so that no arm always follows the same one and
finds its data in the cache), and ratios are taken between samples of the same round.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator

import torch

Arm = Callable[[], object]

SHORTEST = 5e-4
"""Seconds that one sample should last at least; quicker arms are called several times a sample."""


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage now, and not inside the block."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Weave:
    """Times several arms in turns.

    Args:
        arms: name to function; each is called a few times to find out how long it takes.
        device: where the arms run; an accelerator is waited for around every sample.
        shortest: seconds that one sample should last at least.

    Attributes:
        calls: how often an arm is called for one sample, the same for all arms.
        samples: seconds a call of every arm, one number a round, in the order of the rounds.
    """

    def __init__(self, arms: dict[str, Arm], device: str = "cpu", shortest: float = SHORTEST) -> None:
        self._arms = arms
        self._accelerator = torch.device(device).type != "cpu"
        self._random = random.Random(0)
        self.calls = 1
        self.samples: dict[str, list[float]] = {name: [] for name in arms}
        # The first call may allocate, compile or load, and on a busy machine any short one may be interrupted. A slow
        # arm has had enough with one.
        self.seconds = {name: self._seconds(name) for name in arms}
        for name, seconds in self.seconds.items():
            if seconds < 1.0:
                self.seconds[name] = min(self._seconds(name) for _ in range(3 if seconds < 0.1 else 1))
        quickest = min(self.seconds.values())
        self.calls = max(1, min(1000, round(shortest / max(quickest, 1e-7))))

    def sample(self, name: str) -> None:
        """Run one sample of an arm; whoever calls this measures the time."""
        arm = self._arms[name]
        for _ in range(self.calls):
            arm()
        if self._accelerator:
            torch.accelerator.synchronize()

    def _seconds(self, name: str) -> float:
        if self._accelerator:
            torch.accelerator.synchronize()
        start = time.perf_counter()
        self.sample(name)
        return (time.perf_counter() - start) / self.calls

    def round(self, leave_out: Collection[str] = ()) -> None:
        """Time every arm once, in a random order, except those that the caller times itself or not at all."""
        order = [name for name in self._arms if name not in leave_out]
        self._random.shuffle(order)
        for name in order:
            self.samples[name].append(self._seconds(name))

    def rounds_within(self, seconds: float, least: int, most: int, leave_out: Collection[str] = ()) -> int:
        """Return how many rounds fit into a time, but not fewer or more than asked."""
        one = self.calls * sum(seconds for name, seconds in self.seconds.items() if name not in leave_out)
        return max(least, min(most, int(seconds / max(one, 1e-9))))

    def run(self, rounds: int) -> dict[str, list[float]]:
        """Time all arms for a number of rounds and return `samples`."""
        with no_garbage_collection():
            for _ in range(rounds):
                self.round()
        return self.samples


def paired_ratio(samples: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Return the median, the lower and the upper quartile of the ratios of samples of the same round.

    Raises:
        ValueError: if there are no samples, or not equally many.
    """
    if not samples or len(samples) != len(reference):
        raise ValueError(
            f"samples: expected as many as in reference, and at least one; got {len(samples)} and {len(reference)}"
        )
    ratios = sorted(a / b for a, b in zip(samples, reference, strict=True))
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high
