"""The experts that X-LoRA mixes: LoRA adapters that are trained first, each on its share of the classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ... import LoraConfig, get_peft_model
from . import training
from .recipes import METHODS, Method
from .training import Task


def expert_steps(method: Method, steps: int) -> int:
    """Return the steps of one expert: its share of the examples is seen as often as all are by the other methods."""
    return max(1, steps // method.experts)


def prepare(
    task: Task,
    method: Method,
    steps: int,
    folder: Path,
    seed: int,
    track: Callable[[Iterable[Any]], Iterable[Any]],
) -> dict[str, Any]:
    """Train and save the experts under the head of the task's model; return the fields that name them."""
    adapters = {}
    steps = expert_steps(method, steps)
    for number in range(method.experts):
        share = task.data.take((task.data.labels % method.experts == number).nonzero().flatten())
        expert = get_peft_model(copy.deepcopy(task.model), LoraConfig(r=8, lora_alpha=16, target_modules=task.targets))
        arm = training.make_arm(f"expert {number}", expert, METHODS["lora"].rates[task.number], steps)
        training.train([arm], share, steps, task.batch, seed, track)
        adapters[str(number)] = str(folder / "experts" / str(number))
        expert.save_pretrained(adapters[str(number)])
    return {"hidden_size": task.model.classifier.in_features, "adapters": adapters}
