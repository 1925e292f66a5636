"""`experts_implementation="peftk"`: the experts of transformers' models on rows sorted by expert."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..methods import lora_parameter

NAME = "peftk"
"""What the implementation is called in transformers."""


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the output of stacked experts, as transformers' implementations do.

    Frozen experts keep no copies of their weights and no gradients of their size for the backward pass; those that are
    trained, or that Hugging Face PEFT has parametrized, get theirs. Every floating dtype runs, float64 too. Routing,
    shared experts and router losses are the model's own.

    Args:
        module: A module of a class that transformers' `use_experts_implementation` has decorated.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, k), the experts of each token; a number beyond the last one is no expert.
        top_k_weights: (tokens, k), what their outputs are multiplied by.

    Returns:
        (tokens, hidden) in the dtype of `hidden_states`.
    """
    return lora_parameter.experts(module, hidden_states, top_k_index, top_k_weights, {})


def register() -> str:
    """Make the implementation known to transformers, and return its name. A second call changes nothing.

    Adapters of this package on `target_parameters` run on sorted rows whatever the implementation is.

    Raises:
        ImportError: transformers is not installed, or older than its registry of experts (5.0).

    Example:
        >>> from peftk.integrations import hf_experts  # doctest: +SKIP
        >>> model.set_experts_implementation(hf_experts.register())  # doctest: +SKIP
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            f"hf_experts: expected transformers 5, which has a registry of experts; {error}", name="transformers"
        ) from error
    ExpertsInterface.register(NAME, experts_forward)
    return NAME


__all__ = ["NAME", "experts_forward", "register"]
