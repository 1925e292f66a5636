"""One method on one task: peftk, Hugging Face PEFT and the frozen model from the same weights on the same batches."""

from __future__ import annotations

import copy
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import PeftModel, get_peft_model
from ... import nn as layers
from . import experts, training
from .recipes import Method, Sizes
from .training import FROZEN, OURS, PEFT, Arm, Task


@dataclass(frozen=True)
class Limits:
    """How much of a contest is run.

    Attributes:
        steps: Training steps of peftk.
        peft_steps: The most steps of Hugging Face PEFT.
        peft_seconds: The most seconds that these may take; four steps are taken at least.
        frozen_steps: The most steps of the frozen model.
        compared: Examples on which merged and reloaded adapters are compared.
    """

    steps: int
    peft_steps: int
    peft_seconds: float
    frozen_steps: int
    compared: int


def _quietly(call: Callable[[], Any]) -> Any:
    # What the libraries warn about here is known: no base model's name in the file, no CUDA compiler for BOFT.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def _theirs(task: Task, method: Method, config: Any, adapted: nn.Module) -> nn.Module:
    """Return Hugging Face PEFT's model with peftk's first weights."""
    import peft

    model = _quietly(lambda: peft.get_peft_model(copy.deepcopy(task.model), config(peft)))
    if not method.apart[task.number]:
        # Names and shapes are the same, so this is every first weight, the adapter's included.
        model.load_state_dict(adapted.state_dict())
    return model


def contest(
    task: Task,
    method: Method,
    limits: Limits,
    folder: Path,
    seed: int,
    compare: bool,
    track: Callable[[Iterable[Any]], Iterable[Any]],
) -> dict[str, Any]:
    """Train, merge, save and reload one method's adapter, and return every number about it.

    Args:
        task: What is learnt, and by which model; it is not changed.
        method: The method.
        limits: How much is run.
        folder: Where the adapter is saved.
        seed: Decides the adapter's first weights and the order of the batches.
        compare: Run Hugging Face PEFT (if it is installed) and the frozen model as well.
        track: Wraps the numbers of the steps, to show the progress.
    """
    begin = time.perf_counter()
    torch.manual_seed(seed)
    targets = method.targets(task.targets, images=task.number == 1)
    sizes = Sizes.of(task.model, targets, limits.steps)

    mixed = None
    if method.experts:
        mixed = experts.prepare(task, method, limits.steps, folder, seed, track)

    def config(library: Any) -> Any:
        return method.build(library, sizes, targets, mixed)

    adapted = _quietly(lambda: get_peft_model(copy.deepcopy(task.model), config(layers)))
    rate, steps = method.rates[task.number], limits.steps
    ours = training.make_arm(OURS, adapted, rate, steps)
    arms = {OURS: ours}
    apart = method.apart[task.number]
    with_peft = compare and importlib.util.find_spec("peft") is not None and targets == task.targets
    if with_peft:
        theirs = training.make_arm(PEFT, _theirs(task, method, config, adapted), rate, steps, limits.peft_steps)
        theirs.budget = limits.peft_seconds
        arms[PEFT] = theirs
    if compare:
        frozen = training.frozen_copy(task.model, targets)
        arms[FROZEN] = training.make_arm(FROZEN, frozen, rate, steps, limits.frozen_steps)
    training.train(list(arms.values()), task.data, steps, task.batch, seed, track)

    results = _times(arms)
    unmerged = training.logits(adapted, task.held_out)
    results["accuracy"] = {OURS: training.accuracy(unmerged, task.held_out)}
    if with_peft and len(theirs.losses) == steps:
        results["accuracy"][PEFT] = training.accuracy(training.logits(theirs.model, task.held_out), task.held_out)
    if with_peft and not apart:
        pairs = zip(ours.losses, theirs.losses, strict=False)
        results["largest_loss_gap"] = max(abs(one - other) for one, other in pairs)
    results["difference"] = _round_trip(
        task, adapted, unmerged, folder, limits.compared, not method.experts, with_peft and not apart
    )
    trainable, total = adapted.get_nb_trainable_parameters()
    results |= {
        "method": method.name,
        "title": method.title,
        "settings": method.fields(sizes),
        "adapts": targets,
        "rate": rate,
        "steps": steps,
        "parameters": {"trainable": trainable, "all": total},
        "apart": apart if with_peft else "",
        "note": method.note,
        "adapter": str(folder),
        "seconds": time.perf_counter() - begin,
    }
    return results


def _times(arms: dict[str, Arm]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "step_ms": {name: 1000 * arm.median for name, arm in arms.items()},
        "peak_mib": {name: arm.peak_bytes / 2**20 for name, arm in arms.items()},
        "losses": {name: arm.losses for name, arm in arms.items() if name != FROZEN},
    }
    if FROZEN in arms:
        found["of_frozen_step"] = {name: arm.ratio(arms[FROZEN]) for name, arm in arms.items()}
    return found


def _round_trip(
    task: Task,
    adapted: Any,
    unmerged: torch.Tensor,
    folder: Path,
    compared: int,
    merges: bool,
    with_peft: bool,
) -> dict[str, float]:
    """Merge, save and load, and return how far the logits move; on a part, for an evaluation of all costs seconds."""
    part, expected = task.held_out.take(slice(compared)), unmerged[:compared]
    adapted.save_pretrained(str(folder))
    reloaded = _quietly(lambda: PeftModel.from_pretrained(copy.deepcopy(task.model), str(folder)))
    found = {}
    if merges:
        merged = copy.deepcopy(adapted).merge_and_unload()
        found["merged"] = training.distance(training.logits(merged, part), expected)
    found["reloaded"] = training.distance(training.logits(reloaded, part), expected)
    if with_peft:
        import peft

        other = _quietly(lambda: peft.PeftModel.from_pretrained(copy.deepcopy(task.model), str(folder)))
        found[f"read by {PEFT}"] = training.distance(training.logits(other, part), expected)
    return found
