"""Times arms on a GPU: device time by events and wall time, each sample with a cold cache, all arms in turns."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from peftk.testing.memory import saved_bytes
from peftk.testing.timing import no_garbage_collection, paired_ratio

from .arms import Arm, check, described

FLUSHED = 256 * 2**20
"""Bytes written before every sample: several times the L2 cache of any GPU."""

LEAST, MOST = 10, 50


class ColdWeave:
    """Takes samples of several arms in turns, each after the L2 cache was overwritten.

    The device time of a step is that between two events around it. The device is kept busy while the host enqueues the
    step, so that the events do not see how slow Python is; the wall time does.

    Args:
        steps: name to function.
        device: where they run; on the CPU, which only tries this class out, both times are wall time.

    Attributes:
        device_samples: seconds of every step, one number a round.
        wall_samples: the same, until the host knows that the step is done.
    """

    def __init__(self, steps: dict[str, Callable[[], object]], device: str) -> None:
        self._steps = steps
        self._cuda = torch.device(device).type == "cuda"
        self._random = random.Random(0)
        self._buffer = torch.empty(FLUSHED if self._cuda else 1, dtype=torch.int8, device=device)
        self.device_samples: dict[str, list[float]] = {name: [] for name in steps}
        self.wall_samples: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            for _ in range(3):
                step()
        self._cycles = self._cycles_a_second() if self._cuda else 0.0
        self._enqueue = {name: min(self._host_seconds(step) for _ in range(3)) for name, step in steps.items()}
        self.seconds = {name: self._wall(step) for name, step in steps.items()}

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _cycles_a_second(self) -> float:
        cycles = 5_000_000
        torch.cuda._sleep(cycles)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return cycles / (1e-3 * start.elapsed_time(end))

    def _host_seconds(self, step: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        step()
        found = time.perf_counter() - start
        self._synchronize()
        return found

    def _wall(self, step: Callable[[], object]) -> float:
        self._buffer.zero_()
        self._synchronize()
        start = time.perf_counter()
        step()
        self._synchronize()
        return time.perf_counter() - start

    def _device(self, name: str) -> float:
        step = self._steps[name]
        if not self._cuda:
            return self._wall(step)
        self._buffer.zero_()
        busy = min(1.5 * self._enqueue[name] + 1e-4, 0.05)
        torch.cuda._sleep(int(busy * self._cycles))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def rounds_within(self, seconds: float) -> int:
        """Return how many rounds fit into a time, but at least `LEAST` and at most `MOST`."""
        one = sum(2 * self.seconds[name] + 1.5 * self._enqueue[name] + 5e-4 for name in self._steps)
        return max(LEAST, min(MOST, int(seconds / one)))

    def run(self, rounds: int) -> None:
        """Take a sample of both times of every arm in every round, in a random order."""
        names = list(self._steps)
        with no_garbage_collection():
            for _ in range(rounds):
                self._random.shuffle(names)
                for name in names:
                    self.device_samples[name].append(self._device(name))
                    self.wall_samples[name].append(self._wall(self._steps[name]))


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(arm: Arm, device: str) -> int:
    """Return the largest number of bytes allocated on the GPU during one step, above what was there before."""
    for tensor in arm.owned() if arm.owned else ():
        tensor.grad = None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    arm.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kernels(step: Callable[[], object]) -> int:
    """Count the kernels that a step launches, without copies and fills by the driver.

    Raises:
        RuntimeError: if the profiler sees none, as where the machine forbids it.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in found.events() if e.device_type == DeviceType.CUDA]
    launched = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    if not launched:
        raise RuntimeError("the profiler saw no kernel")
    return len(launched)


def inspect(arm: Arm, device: str, backend: str | None = None, launches: bool = True) -> None:
    """Check an arm, refuse it if it is not what its name says, and count memory and kernels.

    Args:
        arm: what to inspect; its `found` is filled.
        device: where it runs.
        backend: the backend that all of its operators must run on.
        launches: count the kernels, which takes the profiler a while.
    """
    start = time.perf_counter()
    # What goes wrong here goes wrong in the check, which notes it.
    with contextlib.suppress(Exception):
        if not arm.skip:
            arm.step()
            _wait(device)
            # With compilation and tuning, where there is any.
            arm.found["first_seconds"] = round(time.perf_counter() - start, 3)
    check(arm)
    found = arm.found
    if found["status"] == "void" and "backend: expected one that can run" in found["reason"]:
        found["status"] = "skipped"
    ran = found.get("backends") or {}
    if backend and found["status"] == "measured" and set(ran.values()) - {backend}:
        fell = ", ".join(f"{operator} on {other}" for operator, other in sorted(ran.items()) if other != backend)
        found.update(status="void", reason=f"refused: not all of it ran on {backend}, but {fell}")
    if found["status"] != "measured" or torch.device(device).type != "cuda":
        return
    counts: dict[str, Callable[[], int]] = {"peak_bytes": lambda: peak_bytes(arm, device)}
    if launches:
        counts["kernels"] = lambda: kernels(arm.step)
    if arm.owned:
        counts["saved_bytes"] = lambda: saved_bytes(arm.step, arm.owned())
    for name, count in counts.items():
        try:
            found[name] = count()
        except Exception as error:
            found[f"{name}_reason"] = f"{type(error).__name__}: {str(error)[:200]}"


def time_arms(arms: list[Arm], device: str, seconds: float, reference: str, forward: bool = False) -> dict[str, Any]:
    """Time the arms that are right, and return what every one of them was found to be.

    Args:
        arms: inspected arms.
        device: where they run.
        seconds: how long to spend on the samples.
        reference: the arm that ratios are taken to.
        forward: time `Arm.forward` instead of `Arm.step`.
    """
    chosen = {arm.name: arm for arm in arms if arm.found["status"] == "measured" and (arm.forward or not forward)}
    all_found = {arm.name: described(arm) for arm in arms if arm.forward or not forward}
    if not chosen:
        return {"arms": all_found, "rounds": 0}
    weave = ColdWeave({name: arm.forward if forward else arm.step for name, arm in chosen.items()}, device)
    rounds = weave.rounds_within(seconds)
    weave.run(rounds)
    for name in chosen:
        found = all_found[name]
        if forward:
            for key in ("peak_bytes", "kernels", "saved_bytes"):
                found.pop(key, None)
        for prefix, samples in (("", weave.device_samples), ("wall_", weave.wall_samples)):
            times = [round(1e6 * second, 3) for second in samples[name]]
            found[f"{prefix}samples_us"], found[f"{prefix}median_us"] = times, statistics.median(times)
            found[f"{prefix}min_us"] = min(times)
            if reference in chosen:
                keys = (f"{prefix}ratio", f"{prefix}ratio_q25", f"{prefix}ratio_q75")
                found.update(zip(keys, paired_ratio(samples[name], samples[reference]), strict=True))
    return {"arms": all_found, "rounds": rounds, "calls_per_sample": 1}
