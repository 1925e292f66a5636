"""What the demos train a method with: settings and learning rates, the same for peftk and Hugging Face PEFT.

A comment beside a rate says which others were tried: 60 steps on the text encoder, 200 on the ConvNet, seed 0, and what
decided was the training loss of the last ten steps. Those without one are first guesses. So the accuracies say that a
method learns, and not which method is best.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Sizes:
    """What settings depend on: the input and output sizes of the layers that are adapted, and the training steps."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: int

    @classmethod
    def of(cls, model: nn.Module, targets: list[str], steps: int) -> Sizes:
        """Return those of the layers of a model whose last name is one of `targets`."""
        inputs, outputs = set(), set()
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in targets and isinstance(module, (nn.Linear, nn.Conv2d)):
                out, *rest = module.weight.shape
                inputs.add(math.prod(rest))
                outputs.add(out)
        return cls(tuple(sorted(inputs)), tuple(sorted(outputs)), steps)


def fitting_block(sizes: tuple[int, ...], most: int = 32) -> int:
    """Return the largest power of two up to `most` that divides every size."""
    common = math.gcd(*sizes)
    while common % most:
        most //= 2
    return most


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    `config` is the name of the class in both libraries, `fields` its settings. `rates` are learning rates for the text
    encoder and for the ConvNet. `apart` says why Hugging Face PEFT does not compute the same thing, if it does not.
    `only` names the layers of the ConvNet that the method is for, if not all. `experts` says how many LoRA adapters are
    trained before, to be mixed. `note` is for the reader of the results.
    """

    name: str
    title: str
    config: str
    fields: Callable[[Sizes], dict[str, Any]]
    rates: tuple[float, float]
    apart: tuple[str, str] = ("", "")
    only: tuple[str, ...] | None = None
    experts: int = 0
    note: str = ""

    def targets(self, names: list[str], images: bool) -> list[str]:
        """Return which layers are adapted, of those that the task names."""
        return [name for name in names if not images or self.only is None or name in self.only]

    def build(self, library: Any, sizes: Sizes, targets: list[str], mixed: dict[str, Any] | None = None) -> Any:
        """Return the configuration, as a class of `library`; `mixed` has the fields that name the experts."""
        kind = getattr(library, self.config)
        where = mixed or {"target_modules": list(targets), "modules_to_save": ["classifier"]}
        return kind(**where, **self.fields(sizes))


@dataclass(frozen=True)
class Elsewhere:
    """A method that the demos do not train: its name, its configuration's, and why, with the place that shows it."""

    name: str
    config: str
    why: str
