"""The methods that the demos train: settings and learning rates of each, the same for peftk and Hugging Face PEFT.

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


def _ada(sizes: Sizes) -> dict[str, Any]:
    # A sixth of the steps at full rank, a third at the end with the ranks that were found.
    times = {"tinit": sizes.steps // 6, "tfinal": sizes.steps // 3, "deltaT": max(1, sizes.steps // 30)}
    return {"init_r": 16, "target_r": 8, "lora_alpha": 32, "total_step": sizes.steps, **times}


def _boft(sizes: Sizes) -> dict[str, Any]:
    # Two factors join pairs of blocks, so that two blocks must fit.
    half = fitting_block(sizes.inputs, 8) // 2
    factors = 2 if half > 1 else 1
    return {"boft_block_size": half if factors == 2 else 2 * half, "boft_n_butterfly_factor": factors}


def _c3a(sizes: Sizes) -> dict[str, Any]:
    # Four blocks a side at least: an update of a small layer in one block would be a handful of numbers.
    every = (*sizes.inputs, *sizes.outputs)
    return {"block_size": fitting_block(every, min(64, min(every) // 4)), "init_weights": True}


ONE_FACTOR = "without a CUDA compiler, Hugging Face PEFT runs BOFT with one factor, whatever is asked for"
WRONG_GRADIENT = "Hugging Face PEFT's C3A has another input gradient, so its training differs"
CONV_OFT = "Hugging Face PEFT's OFT on a convolution computes something else than its merged weight"

_RECIPES = (
    Method(
        "lora",
        "LoRA, rank 16",
        "LoraConfig",
        lambda sizes: {"r": 16, "lora_alpha": 32},
        # Half is a little slower on the encoder. On the ConvNet twice as much is as good, four times stops learning.
        (2e-3, 5e-3),
    ),
    Method(
        "dora",
        "DoRA, rank 16",
        "LoraConfig",
        lambda sizes: {"r": 16, "lora_alpha": 32, "use_dora": True},
        # On the ConvNet twice as much is worse, and four times stops learning.
        (2e-3, 5e-3),
    ),
    # On the encoder a fifth is slower.
    Method("adalora", "AdaLoRA, rank 16 to 8", "AdaLoraConfig", _ada, (1e-2, 2e-2)),
    # On the encoder a quarter is slower.
    Method("loha", "LoHa, rank 8", "LoHaConfig", lambda sizes: {"r": 8, "alpha": 16}, (4e-3, 2e-2)),
    # On the encoder a quarter is slower.
    Method("lokr", "LoKr, rank 8", "LoKrConfig", lambda sizes: {"r": 8, "alpha": 16}, (4e-3, 2e-2)),
    Method(
        "oft",
        "OFT, Cayley-Neumann",
        "OFTConfig",
        lambda sizes: {"oft_block_size": fitting_block(sizes.inputs)},
        # On the encoder twice, four and eight times as much are worse.
        (5e-4, 2e-2),
        ("", CONV_OFT),
    ),
    Method(
        "oft-exact",
        "OFT, exact Cayley",
        "OFTConfig",
        lambda sizes: {"oft_block_size": fitting_block(sizes.inputs), "use_cayley_neumann": False},
        # On the encoder eight times as much is worse.
        (5e-4, 2e-2),
        ("", CONV_OFT),
    ),
    Method(
        "boft",
        "BOFT, 2 factors",
        "BOFTConfig",
        _boft,
        # On the encoder a third is no better. On the ConvNet a half and a quarter are slower.
        (3e-3, 2e-2),
        (ONE_FACTOR, ONE_FACTOR),
    ),
    Method(
        "c3a",
        "C3A",
        "C3AConfig",
        _c3a,
        # On the encoder a third is no better. On the ConvNet a third, a sixth and three times as much are worse.
        (1e-1, 3e-1),
        (WRONG_GRADIENT, WRONG_GRADIENT),
        ("point",),
    ),
    Method(
        "xlora",
        "X-LoRA, 2 experts",
        "XLoraConfig",
        lambda sizes: {"xlora_depth": 2, "xlora_size": 64, "xlora_dropout_p": 0.0},
        (1e-2, 1e-2),
        experts=2,
        note="X-LoRA mixes two LoRA adapters that were trained before, each on every second class. What it mixes "
        "differs from token to token, so that no weight can hold it: it is not merged",
    ),
)
METHODS = {method.name: method for method in _RECIPES}


@dataclass(frozen=True)
class Elsewhere:
    """A method that the demos do not train: its configuration's name, and why, with the place where it is shown."""

    config: str
    why: str


ELSEWHERE = {
    "adaption_prompt": Elsewhere(
        "AdaptionPromptConfig",
        "Llama-Adapter's prompts are for the attention of LLaMA, Mistral and GPT-2, which an encoder has not; "
        "see examples/llama_adaption_prompt.py",
    ),
}
