"""The configuration of X-LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..base.config import PeftConfig, PeftType, check_bool, check_int, check_number, warn_of_field

MAX_SIZE = 1_000_000
MAX_DEPTH = 1_000


@dataclass
class XLoraConfig(PeftConfig, method=PeftType.XLORA):
    """Configuration of X-LoRA, with the fields and defaults of PEFT 0.21.

    ``y = base(x) + w * sum_i g_i s_i B_i(A_i(dropout(x)))``: LoRA experts, each with its own scale s_i, whose weights
    g_i a classifier predicts for every token from the last hidden state of the base model.

    Args:
        hidden_size: Size of the hidden states; None means 4096, with a warning.
        adapters: Names to the folders of the experts, which are saved LoRA adapters. They become the adapters "0", "1",
            and so on, in this order.
        enable_softmax: Softmax over the experts.
        enable_softmax_topk: Softmax over the experts that `top_k_lora` leaves; meant for use without `enable_softmax`.
        layerwise_scalings: Predict weights for every adapted layer, instead of one set for all of them.
        xlora_depth: Number of linear layers of the classifier.
        xlora_size: Width of its hidden layers.
        xlora_dropout_p: Dropout between them.
        use_trainable_adapters: Train the experts too.
        softmax_temperature: What the logits are divided by before the softmax.
        top_k_lora: How many experts act on a token; the others get weight 0, without renormalisation. None means all.
        scaling_pass_value: Weight of every expert while the hidden states for the classifier are computed; 0 switches
            them off.
        global_scaling_weight: The factor w.

    Source: Buehler and Buehler, X-LoRA: Mixture of Low-Rank Adapter Experts, arXiv 2402.07148.

    Example:
        >>> from peftk import XLoraConfig
        >>> XLoraConfig(hidden_size=64, adapters={"physics": "adapters/physics"}, top_k_lora=1).xlora_depth
        1
    """

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    # What it adapts are layers of LoRA, whose experts need a pass that weights them.
    _forms = ()
    _meaning = (
        "hidden_size",
        "enable_softmax",
        "enable_softmax_topk",
        "layerwise_scalings",
        "xlora_depth",
        "xlora_size",
        "softmax_temperature",
    )
    # The classifier decides what every adapter of the model does.
    _alone = True

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if self.hidden_size is None:
            warn_of_field("hidden_size: None, so 4096 is taken; it must be that of the model", stacklevel=3)
            self.hidden_size = 4096
        if self.adapters is None:
            warn_of_field("adapters: None, so there are no experts", stacklevel=3)
            self.adapters = {}
        if not isinstance(self.adapters, Mapping):
            raise TypeError(f"adapters: expected a dict of names to folders, got {self.adapters!r}")
        for name, folder in self.adapters.items():
            if not isinstance(name, str) or not isinstance(folder, (str, os.PathLike)):
                raise TypeError(f"adapters: expected a dict of names to folders, got {name!r}: {folder!r}")
        self.adapters = {name: os.fspath(folder) for name, folder in self.adapters.items()}
        for name in ("hidden_size", "xlora_size"):
            check_int(name, getattr(self, name), 1, MAX_SIZE)
        check_int("xlora_depth", self.xlora_depth, 1, MAX_DEPTH)
        for name in ("enable_softmax", "enable_softmax_topk", "layerwise_scalings", "use_trainable_adapters"):
            check_bool(name, getattr(self, name))
        check_number("xlora_dropout_p", self.xlora_dropout_p, 0, 1)
        check_number("softmax_temperature", self.softmax_temperature, 0, 1e6, above=True)
        if self.top_k_lora is not None:
            check_int("top_k_lora", self.top_k_lora, 1, MAX_SIZE)
        for name in ("scaling_pass_value", "global_scaling_weight"):
            check_number(name, getattr(self, name), -1e6, 1e6)
        if self.enable_softmax_topk and self.top_k_lora is None:
            warn_of_field("enable_softmax_topk: top_k_lora is None, so the softmax is over all experts", stacklevel=3)
        if self.enable_softmax_topk and self.enable_softmax:
            warn_of_field("enable_softmax_topk: enable_softmax is set too, so two softmaxes are applied", stacklevel=3)


__all__ = ["XLoraConfig"]
