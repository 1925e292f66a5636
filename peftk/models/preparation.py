"""Preparing a base model for training, under the name of Hugging Face PEFT."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

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


__all__ = ["prepare_model_for_kbit_training"]
