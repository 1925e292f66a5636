"""Optimisers with a learning rate of their own for some of an adapter's parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base.config import check_number


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> torch.optim.Optimizer:
    """Return an optimiser whose learning rate of LoRA's B is a multiple of that of A: LoRA+.

    Args:
        model: The adapted model.
        optimizer_cls: A class of optimisers.
        lr: The learning rate of A, and of all else that is trained.
        loraplus_lr_ratio: How many times larger that of B, and of vectors, is.
        **kwargs: `loraplus_weight_decay` (0.0), `loraplus_lr_embedding` (1e-6, for adapters on embeddings), and the
            arguments of the optimiser.

    Raises:
        ValueError: Nothing is trained, or a number is out of range.

    Source: Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354.
    """
    check_number("lr", lr, 0, 1e9, above=True)
    check_number("loraplus_lr_ratio", loraplus_lr_ratio, 0, 1e9, above=True)
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    of_embeddings = kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups: dict[str, list[Tensor]] = {"a": [], "embedding": [], "b": [], "vectors": []}
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding_" in name:
            groups["embedding"].append(parameter)
        elif "lora_B" in name or parameter.dim() == 1:
            plain = name.endswith("bias") or ".bias" in name or id(parameter) in norms
            groups["vectors" if plain else "b"].append(parameter)
        else:
            groups["a"].append(parameter)
    if not any(groups.values()):
        raise ValueError("model: expected trained parameters, got none")
    fast = lr * loraplus_lr_ratio
    return optimizer_cls(
        [
            {"params": groups["a"], "weight_decay": decay, "lr": lr},
            {"params": groups["embedding"], "weight_decay": decay, "lr": of_embeddings},
            {"params": groups["b"], "weight_decay": decay, "lr": fast},
            {"params": groups["vectors"], "weight_decay": 0.0, "lr": fast},
        ],
        **{"lr": lr, **kwargs},
    )


__all__ = ["create_loraplus_optimizer"]
