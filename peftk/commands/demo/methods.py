"""The methods that the demos train: settings and learning rates of each, the same for peftk and Hugging Face PEFT.

The rates were not tuned with the same care. On the text encoder those of LoRA and OFT were tried at 120 steps, the
others are first guesses; on the ConvNet those of LoRA, LoHa and OFT were tried, the others are first guesses. So the
accuracies say that a method learns, and not which method is best.
"""

from __future__ import annotations

import functools
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
    `only` names the layers of the ConvNet that the method is for, if not all.
    """

    name: str
    title: str
    config: str
    fields: Callable[[Sizes], dict[str, Any]]
    rates: tuple[float, float]
    apart: tuple[str, str] = ("", "")
    only: tuple[str, ...] | None = None

    def targets(self, names: list[str], images: bool) -> list[str]:
        """Return which layers are adapted, of those that the task names."""
        return [name for name in names if not images or self.only is None or name in self.only]

    def build(self, library: Any, sizes: Sizes, targets: list[str]) -> Any:
        """Return the configuration, as a class of `library`."""
        kind = getattr(library, self.config)
        return kind(target_modules=list(targets), modules_to_save=["classifier"], **self.fields(sizes))


def _ada(sizes: Sizes) -> dict[str, Any]:
    # A sixth of the steps at full rank, a third at the end with the ranks that were found.
    times = {"tinit": sizes.steps // 6, "tfinal": sizes.steps // 3, "deltaT": max(1, sizes.steps // 30)}
    return {"init_r": 16, "target_r": 8, "lora_alpha": 32, "total_step": sizes.steps, **times}


def _boft(sizes: Sizes) -> dict[str, Any]:
    # Two factors join pairs of blocks, so that two blocks must fit.
    half = fitting_block(sizes.inputs, 8) // 2
    factors = 2 if half > 1 else 1
    return {"boft_block_size": half if factors == 2 else 2 * half, "boft_n_butterfly_factor": factors}


ONE_FACTOR = "without a CUDA compiler, Hugging Face PEFT runs BOFT with one factor, whatever is asked for"
WRONG_GRADIENT = "Hugging Face PEFT's C3A has another input gradient, so its training differs"
CONV_OFT = "Hugging Face PEFT's OFT on a convolution computes something else than its merged weight"

RECIPES = (
    Method("lora", "LoRA, rank 16", "LoraConfig", lambda sizes: {"r": 16, "lora_alpha": 32}, (2e-3, 1e-2)),
    Method(
        "dora",
        "DoRA, rank 16",
        "LoraConfig",
        lambda sizes: {"r": 16, "lora_alpha": 32, "use_dora": True},
        (2e-3, 1e-2),
    ),
    Method("adalora", "AdaLoRA, rank 16 to 8", "AdaLoraConfig", _ada, (4e-3, 2e-2)),
    Method("loha", "LoHa, rank 8", "LoHaConfig", lambda sizes: {"r": 8, "alpha": 16}, (4e-3, 2e-2)),
    Method("lokr", "LoKr, rank 8", "LoKrConfig", lambda sizes: {"r": 8, "alpha": 16}, (4e-3, 2e-2)),
    Method(
        "oft",
        "OFT, Cayley-Neumann",
        "OFTConfig",
        lambda sizes: {"oft_block_size": fitting_block(sizes.inputs)},
        (4e-3, 2e-2),
        ("", CONV_OFT),
    ),
    Method(
        "oft-exact",
        "OFT, exact Cayley",
        "OFTConfig",
        lambda sizes: {"oft_block_size": fitting_block(sizes.inputs), "use_cayley_neumann": False},
        (4e-3, 2e-2),
        ("", CONV_OFT),
    ),
    Method("boft", "BOFT, 2 factors", "BOFTConfig", _boft, (1e-2, 1e-2), (ONE_FACTOR, ONE_FACTOR)),
    Method(
        "c3a",
        "C3A",
        "C3AConfig",
        lambda sizes: {"block_size": fitting_block((*sizes.inputs, *sizes.outputs), 64), "init_weights": True},
        (1e-1, 1e-1),
        (WRONG_GRADIENT, WRONG_GRADIENT),
        ("point",),
    ),
)

# What is not trained here, and where it is shown.
ELSEWHERE = {
    "XLoraConfig": "X-LoRA mixes experts that were trained before: examples/x_lora.py",
    "AdaptionPromptConfig": "adaption prompts are for LLaMA, Mistral and GPT-2: examples/llama_adaption_prompt.py",
}


def _exported() -> dict[str, type]:
    """Return the configuration classes of the methods that peftk exports, by name."""
    import importlib

    library = importlib.import_module(__package__.partition(".")[0])
    names = {name: getattr(library, name) for name in library.__all__}
    return {name: kind for name, kind in names.items() if isinstance(kind, type) and getattr(kind, "_method", None)}


def _runs(method: Method, kinds: dict[str, type]) -> bool:
    if method.config not in kinds:
        return False
    try:
        kinds[method.config](**method.fields(Sizes((64,), (64,), 12)))
    except NotImplementedError:
        return False
    return True


@functools.cache
def available() -> dict[str, Method]:
    """Return the methods that this release can train, by the name on the command line.

    A configuration that peftk exports and that has no recipe above is taken with its defaults.
    """
    kinds = _exported()
    found = [method for method in RECIPES if _runs(method, kinds)]
    known = {method.config for method in RECIPES} | set(ELSEWHERE)
    for name in kinds.keys() - known:
        plain = name.removesuffix("Config")
        found.append(Method(plain.lower(), plain, name, lambda sizes: {}, (2e-3, 1e-2)))
    return {method.name: method for method in found}
