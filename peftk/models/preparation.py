"""Preparing a base model for training, and an optimiser for its adapters, under the names of Hugging Face PEFT."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base.config import check_number

_PACKED = ("gptq", "aqlm", "eetq", "torchao", "hqq")
_HALF = (torch.float16, torch.bfloat16)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a quantised model, keep its other weights in float32, and switch gradient checkpointing on.

    Args:
        model: A transformers model, quantised or not; it is changed and returned.
        use_gradient_checkpointing: Whether a quantised model recomputes activations in the backward pass.
        gradient_checkpointing_kwargs: For `gradient_checkpointing_enable`, as ``{"use_reentrant": False}``.
        auto_clear_cache: Give memory that the casts have freed back to the device.

    Raises:
        TypeError: `model` is no module.
        ValueError: It is quantised, and has no gradient checkpointing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    flags = any(getattr(model, flag, False) is True for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit"))
    method = getattr(getattr(model, "quantization_method", None), "value", getattr(model, "quantization_method", None))
    packed = method in _PACKED or getattr(model, "hqq_quantized", False) is True
    checkpoints = (flags or packed) and use_gradient_checkpointing
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if checkpoints and enable is None:
        raise ValueError(
            f"use_gradient_checkpointing: {type(model).__name__} has no gradient_checkpointing_enable; pass False"
        )
    model.requires_grad_(False)
    if not packed:
        _widen(model, auto_clear_cache)
    if checkpoints and enable is not None:
        options = dict(gradient_checkpointing_kwargs or {})
        if options.get("use_reentrant", True):
            _let_inputs_require_grad(model)
        takes = "gradient_checkpointing_kwargs" in inspect.signature(enable).parameters
        if options and not takes:
            warnings.warn("gradient_checkpointing_kwargs: this model takes none; they are left out", stacklevel=2)
        enable(**({"gradient_checkpointing_kwargs": options} if takes else {}))
    return model


def _widen(model: nn.Module, clear: bool) -> None:
    for parameter in model.parameters():
        if parameter.dtype in _HALF and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()
    if clear and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _let_inputs_require_grad(model: Any) -> None:
    """Let the output of the embeddings require a gradient: reentrant checkpoints pass none on without."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    else:
        model.get_input_embeddings().register_forward_hook(lambda _module, _args, y: y.requires_grad_(True))


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


__all__ = ["create_loraplus_optimizer", "prepare_model_for_kbit_training"]
