"""The experts that X-LoRA mixes: LoRA adapters that are trained first, each on its share of the classes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ... import LoraConfig, get_peft_model
from . import training
from .methods import METHODS, Method
from .training import Task


def prepare(
    task: Task,
    method: Method,
    head: nn.Module,
    steps: int,
    folder: Path,
    seed: int,
    track: Callable[[Iterable], Iterable],
) -> tuple[Task, dict[str, Any]]:
    """Train and save the experts; return the task on a model with the trained head, and the fields that name them.

    X-LoRA's file holds neither a head nor anything else of the model, so that the head is trained before and stays.
    """
    model = copy.deepcopy(task.model)
    model.classifier = copy.deepcopy(head)
    adapters = {}
    for number in range(method.experts):
        share = task.data.take((task.data.labels % method.experts == number).nonzero().flatten())
        expert = get_peft_model(copy.deepcopy(model), LoraConfig(r=8, lora_alpha=16, target_modules=task.targets))
        arm = training.make_arm(f"expert {number}", expert, METHODS["lora"].rates[task.number], steps)
        training.train([arm], share, steps, task.batch, seed, track)
        adapters[str(number)] = str(folder / "experts" / str(number))
        expert.save_pretrained(adapters[str(number)])
    return dataclasses.replace(task, model=model), {"hidden_size": head.in_features, "adapters": adapters}
