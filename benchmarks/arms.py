"""One comparison: check every arm against float64, count its memory, then time all arms in turns.

pytest-benchmark times one function a test, one test after another, which on a shared machine compares different
minutes. Here one test is one comparison: pytest-benchmark's pedantic mode times peftk's arm, and its untimed set-up
hook, which runs before every sample, times each other arm once. So all arms take turns in one run, in a random order,
on the same clock, and the JSON holds every sample of every arm in `extra_info`.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

import peftk
from peftk.runtime import registry, settings, timings
from peftk.testing.memory import peak_bytes, saved_bytes
from peftk.testing.timing import Weave, no_garbage_collection, paired_ratio

PACKAGES = ("torch", "triton", "peft", "lycoris_lora", "transformers", "numpy")


@dataclass
class Arm:
    """One contestant.

    Attributes:
        name: short and unique in its comparison.
        step: what is timed.
        check: runs the arm and returns the relative error of each result; called before anything is timed.
        limit: largest error of a result that may be timed.
        owned: returns tensors that exist without the arm (inputs, parameters), which are not counted as saved.
        note: what a reader should know about this arm.
        remark: how its function differs from that of the other arms, for the report.
        skip: why the arm cannot run at all.
        forward: the forward pass of the step alone, with what autograd records.
    """

    name: str
    step: Callable[[], object] | None = None
    check: Callable[[], dict[str, float]] | None = None
    limit: float = 0.0
    owned: Callable[[], list[torch.Tensor]] | None = None
    note: str = ""
    remark: str = ""
    skip: str | None = None
    forward: Callable[[], object] | None = None
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """How much to measure: seconds for the samples of one comparison, and bounds on the rounds.

    A comparison in which one sample takes more than `slow` seconds gets `least_slow` rounds at least; if that sample is
    a peer's, the peer alone gets so few. No comparison takes many more than `longest` seconds.
    """

    seconds: float = 4.0
    least: int = 50
    most: int = 200
    slow: float = 2.0
    least_slow: int = 5
    longest: float = 240.0


QUICK = Budget(seconds=0.2, least=3, most=10, least_slow=1)


def check(arm: Arm) -> None:
    """Run an arm's check and note its errors, and why it must not be timed if so."""
    if arm.skip:
        arm.found.update(status="skipped", reason=arm.skip)
        return
    try:
        with traced_backends() as backends:
            errors = arm.check()
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        arm.found.update(status="void", reason=f"{type(error).__name__}: {message[0][:300]}")
        return
    arm.found.update(status="measured", errors=errors, backends=backends, limit=arm.limit)
    # Not `>`: a NaN must not pass.
    if wrong := {name: e for name, e in errors.items() if not e <= arm.limit}:
        found = ", ".join(f"{name} {e:.1e}" for name, e in wrong.items())
        arm.found.update(status="void", reason=f"error against float64 above {arm.limit:.1e}: {found}")


class traced_backends:
    """Collects which backend really ran each operator, whatever the tables and the settings say."""

    def __enter__(self) -> dict[str, str]:
        self._select = select = registry.Operator.select
        found: dict[str, str] = {}

        def traced(operator: registry.Operator, args: tuple) -> Callable:
            kernel = select(operator, args)
            found[operator.name] = next(b for b in settings.BACKENDS if kernel is operator.kernel(b)[0])
            return kernel

        registry.Operator.select = traced
        return found

    def __exit__(self, *_: object) -> None:
        registry.Operator.select = self._select


def compare(benchmark: Any, arms: list[Arm], reference: str, info: dict[str, Any], budget: Budget) -> None:
    """Check, count and time the arms of one comparison, and leave everything in ``benchmark.extra_info``.

    Args:
        benchmark: pytest-benchmark's fixture.
        arms: the first one is peftk's, which pytest-benchmark times.
        reference: the name of the arm that ratios are taken to.
        info: what identifies the comparison.
        budget: how much to measure.

    Raises:
        AssertionError: after everything is recorded, if peftk's arm or the reference is void.
    """
    for arm in arms:
        check(arm)
    valid = {arm.name: arm for arm in arms if arm.found["status"] == "measured"}
    for arm in valid.values():
        if arm.owned:
            for name, count in (("saved_bytes", saved_bytes), ("peak_bytes", peak_bytes)):
                try:
                    arm.found[name] = count(arm.step, arm.owned())
                except Exception as error:
                    arm.found[f"{name}_reason"] = f"{type(error).__name__}: {str(error)[:200]}"
    benchmark.extra_info.update(info, reference=reference, **environment())
    if valid:
        _time(benchmark, valid, budget, reference)
        if reference in valid:
            for arm in valid.values():
                times, others = arm.found["samples_us"], valid[reference].found["samples_us"]
                ratios = paired_ratio(times, others[: len(times)])
                arm.found["ratio"], arm.found["ratio_q25"], arm.found["ratio_q75"] = ratios
    benchmark.extra_info["arms"] = {arm.name: described(arm) for arm in arms}
    for arm in arms:
        if arm is arms[0] or arm.name == reference:
            assert arm.found["status"] == "measured", f"{arm.name}: {arm.found['reason']}"


def described(arm: Arm) -> dict[str, Any]:
    """Return all that is known about an arm."""
    return {"note": arm.note, **({"remark": arm.remark} if arm.remark else {}), **arm.found}


def _time(benchmark: Any, valid: dict[str, Arm], budget: Budget, reference: str) -> None:
    lead = next(iter(valid))
    weave = Weave({name: arm.step for name, arm in valid.items()})
    # A peer that is so slow must not take the samples of all the others: it takes part in the first rounds only.
    rare = {n for n, seconds in weave.seconds.items() if seconds > budget.slow and n not in (lead, reference)}
    slowest = max(seconds for name, seconds in weave.seconds.items() if name not in rare)
    few = budget.least_slow
    least = few if slowest > budget.slow else budget.least
    rounds = weave.rounds_within(budget.seconds, least, budget.most, rare)
    rounds = min(rounds, weave.rounds_within(budget.longest, few, rounds, rare))
    started = 0

    def others() -> None:
        nonlocal started
        started += 1
        weave.round({lead} if started <= few else {lead, *rare})

    with no_garbage_collection():
        benchmark.pedantic(lambda: weave.sample(lead), setup=others, rounds=rounds, iterations=1)
    weave.samples[lead] = [seconds / weave.calls for seconds in benchmark.stats.stats.data]
    benchmark.extra_info.update(rounds=rounds, calls_per_sample=weave.calls, load_after=round(os.getloadavg()[0], 2))
    for name, arm in valid.items():
        times = [round(1e6 * seconds, 3) for seconds in weave.samples[name]]
        arm.found.update(samples_us=times, median_us=statistics.median(times), min_us=min(times))
        if len(times) < rounds:
            seconds = 1e-6 * arm.found["median_us"]
            rarely = f"one step takes {seconds:.1f} s, so it took part in the first {len(times)} rounds only"
            arm.remark = "; ".join(filter(None, (arm.remark, rarely)))


def environment(device: str = "cpu") -> dict[str, Any]:
    """Describe the machine and the versions, without anything that names the machine."""
    on_cpu = torch.device(device).type == "cpu"
    return {
        "device_class": timings.device_class(torch.device(device).type),
        "processor": _processor() if on_cpu else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "peftk": peftk.__version__,
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
