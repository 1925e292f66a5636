"""The configuration of AdaLoRA."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..base.config import Form, PeftType, check_bool, check_int, check_number, warn_of_field
from ..lora.config import MAX_ALPHA, MAX_RANK, LoraConfig

MAX_STEPS = 2**53


@dataclass
class AdaLoraConfig(LoraConfig, method=PeftType.ADALORA):
    """Configuration of AdaLoRA, with the fields and defaults of PEFT 0.21.

    ``y = base(x) + s / (init_r + 1e-5) * B (E * A dropout(x))`` with ``s = lora_alpha``, or ``init_r`` where that is
    not positive. The rank of every layer starts at `init_r`; `PeftModel.update_and_allocate`, called after every
    backward pass, zeroes entries of E until the layers have rank `target_r` on average. There are three phases:
    `tinit` steps without pruning, then a budget that falls with the cube of the remaining share, and `tfinal` steps
    with the ranks that were found.

    Args:
        target_r: Average rank at the end.
        init_r: Rank of every layer at the start.
        tinit: Steps before the budget falls.
        tfinal: Steps after the budget has reached its target.
        deltaT: Steps from one pruning to the next.
        beta1: Smoothing of the importance, between 0 and 1.
        beta2: Smoothing of its uncertainty, between 0 and 1.
        orth_reg_weight: Weight of the orthogonality term, see `PeftModel.orthogonality_loss`.
        orth_reg_in_loss: Whether a model with a `task_type` adds that term to `outputs.loss`, as PEFT does. It is not
            in files.
        total_step: Number of training steps; required.
        rank_pattern: Which of its `init_r` triplets each layer keeps; found in training and read from files.
        lora_alpha: As in `LoraConfig`; 0 or less stands for `init_r`.
        init_lora_weights: True (E zero, A and B normal with deviation 0.02) or False (all standard normal).
        r: Not used; `init_r` is the rank.

    The remaining fields are those of `LoraConfig`. `use_rslora`, `lora_bias`, `alpha_pattern`, `use_dora` and
    `loftq_config` have no meaning here and are refused.

    Raises:
        ValueError: `total_step` is missing, or the two outer phases leave no step for the one between them.

    Source: Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512.

    Example:
        >>> from peftk import AdaLoraConfig
        >>> AdaLoraConfig(init_r=6, target_r=4, total_step=100, target_modules=["query", "value"]).init_r
        6
    """

    rank_pattern: dict[str, Any] | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    orth_reg_in_loss: bool = True

    _never_in_file = LoraConfig._never_in_file | {"orth_reg_in_loss"}
    _forms = (Form("AdaLoRA", {"init_r": 4, "target_r": 2, "total_step": 9}),)
    _meaning: ClassVar[tuple[str, ...]] = ("init_r", "lora_alpha", "bias", "modules_to_save")
    _default_targets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "t5": ("q", "k", "v", "o", "wi", "wo"),
        "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
        **dict.fromkeys(("bart", "opt"), ("q_proj", "v_proj", "k_proj", "out_proj", "fc1", "fc2")),
        "roberta": ("query", "key", "value", "dense"),
        "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    }

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("use_dora", "loftq_config", "use_rslora", "lora_bias", "alpha_pattern", "target_parameters"):
            if getattr(self, name):
                raise ValueError(f"{name}: has no meaning for AdaLoRA, got {getattr(self, name)!r}")
        super().__post_init__()
        if self.r != LoraConfig.r:
            warn_of_field("r: AdaLoRA does not use it; init_r is the initial rank", stacklevel=3)
        check_int("init_r", self.init_r, 1, MAX_RANK)
        check_int("target_r", self.target_r, 0, MAX_RANK)
        for name in ("tinit", "tfinal"):
            check_int(name, getattr(self, name), 0, MAX_STEPS)
        check_int("deltaT", self.deltaT, 1, MAX_STEPS)
        for name in ("beta1", "beta2"):
            check_number(name, getattr(self, name), 0, 1)
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a number between 0 and 1, got {getattr(self, name)!r}")
        check_number("orth_reg_weight", self.orth_reg_weight, 0, 1e6)
        check_bool("orth_reg_in_loss", self.orth_reg_in_loss)
        if self.total_step is None:
            raise ValueError("total_step: expected the number of training steps, got None")
        check_int("total_step", self.total_step, 1, MAX_STEPS)
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                "tinit, tfinal, total_step: expected tinit < total_step - tfinal, so that there are steps in which the "
                f"budget falls; got tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step}"
            )
        if self.target_r > self.init_r and not self.inference_mode:
            warn_of_field(
                f"target_r: {self.target_r} is above init_r={self.init_r}, so that nothing will be pruned", stacklevel=3
            )

    def _check_alpha(self) -> None:
        check_number("lora_alpha", self.lora_alpha, -MAX_ALPHA, MAX_ALPHA)

    def _check_init(self) -> None:
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(f"init_lora_weights: expected True or False, got {self.init_lora_weights!r}")

    def _check_patterns(self) -> None:
        self.alpha_pattern = {} if self.alpha_pattern is None else self.alpha_pattern
        if self.rank_pattern is None:
            return
        if not isinstance(self.rank_pattern, dict):
            raise TypeError(f"rank_pattern: expected a dict from names of lora_E to lists, got {self.rank_pattern!r}")
        for key, kept in self.rank_pattern.items():
            if not isinstance(key, str) or ".lora_E" not in f".{key}":
                raise ValueError(f"rank_pattern: expected the names of lora_E parameters as keys, got {key!r}")
            flags = isinstance(kept, (list, tuple)) and all(isinstance(flag, bool) for flag in kept)
            if not flags or len(kept) != self.init_r:
                raise ValueError(
                    f"rank_pattern[{key!r}]: expected a list of init_r={self.init_r} booleans, got {kept!r}"
                )

    def unused_keys(self, patterns: Collection[str], module_names: Collection[str]) -> list[str]:
        """Return the keys of `rank_pattern` that mean none of these modules."""
        names = set(module_names)
        return sorted(key for key in patterns if module_of(key) not in names)

    def kept_triplets(self, module_name: str) -> list[int]:
        """Return which of the `init_r` triplets of a module `rank_pattern` keeps."""
        patterns = self.rank_pattern or {}
        key = _first_keys(tuple(patterns)).get(module_name)
        kept = [True] * self.init_r if key is None else patterns[key]
        return [index for index, flag in enumerate(kept) if flag]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, with the keys of `rank_pattern` as files have them: no adapter name."""
        values = super().to_dict()
        if values["rank_pattern"] is not None:
            values["rank_pattern"] = {
                f"{module_of(key)}.lora_E": list(kept) for key, kept in values["rank_pattern"].items()
            }
        return values


def module_of(key: str) -> str:
    """Return the module path in a key of `rank_pattern`: all that stands before `lora_E`."""
    return f".{key}".rpartition(".lora_E")[0][1:]


@functools.lru_cache(maxsize=8)
def _first_keys(keys: tuple[str, ...]) -> dict[str, str]:
    """Return the first key for every module that the keys of `rank_pattern` mean."""
    return {module_of(key): key for key in reversed(keys)}


__all__ = ["AdaLoraConfig"]
