"""Batches that mix adapters: every sample with the LoRA adapter of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..nn import LoraConfig
from ..nn.base.adapter_layer import AdapterLayer
from ..nn.base.saved import ModulesToSaveWrapper
from ..nn.base.undo import put_back
from ..nn.lora.layer import BASE, LoRALayer
from ..nn.trainable_tokens import TrainableTokens
from .adapters import Tuner
from .targets import describe_unknown


class _Names(list[str]):
    """The adapter of every sample; generation may run several copies of each."""

    def __init__(self, names: Sequence[str], copies: int) -> None:
        super().__init__(names)
        self.copies = copies

    def of(self, samples: int) -> list[str]:
        """Return the names for a batch of this size; an encoder sees it before it is copied."""
        if self.copies > 1 and samples == len(self) * self.copies:
            return [name for name in self for _ in range(self.copies)]
        return list(self)


def check(tuner: Tuner, parts: Iterable[nn.Module], adapter_names: Any) -> list[str]:
    """Return the adapters of a batch as a list, or raise if they cannot be mixed in one."""
    if isinstance(adapter_names, str) or not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"adapter_names: expected a list with one name for each sample, got {adapter_names!r}")
    names = list(adapter_names)
    wrong = [name for name in dict.fromkeys(names) if name != BASE and name not in tuner.peft_config]
    if wrong:
        raise ValueError(
            f"adapter_names: Trying to infer with non-existing adapter(s): {', '.join(sorted(map(str, wrong)))}: "
            f"{describe_unknown(map(str, wrong), tuner.peft_config)}"
        )
    for name in dict.fromkeys(names):
        config = tuner.peft_config.get(name)
        if config is None:
            continue
        if type(config) is not LoraConfig:
            raise ValueError(
                f"adapter_names: adapter {name!r} is {config._kind}; only LoRA adapters can be mixed in a batch"
            )
        if config.use_dora:
            raise ValueError(
                f"adapter_names: Cannot pass `adapter_names` when DoRA is enabled. Adapter {name!r} has it; only LoRA "
                "adapters can be mixed in a batch"
            )
        if config.bias != "none":
            raise ValueError(
                f"adapter_names: adapter {name!r} trains biases of the base model (bias={config.bias!r}), which all "
                "samples share; only adapters with bias='none' can be mixed in a batch"
            )
        if any(name in part.modules_to_save for part in parts if isinstance(part, ModulesToSaveWrapper)):
            raise ValueError(
                f"adapter_names: adapter {name!r} has its own copy of modules in modules_to_save, which cannot be "
                "mixed in a batch"
            )
    if tuner.training and any(_runs_again(module) for module in tuner.model.modules()):
        raise ValueError(
            "adapter_names: activation checkpointing would run the layers again after the call, when nobody knows "
            "which adapter each sample had; switch it off (gradient_checkpointing_disable), or call eval()"
        )
    if any(part.merged_adapters for part in parts if isinstance(part, AdapterLayer)):
        merged = next(path for path, layer in tuner._layers() if layer.merged_adapters)
        raise ValueError(
            "adapter_names: Cannot pass `adapter_names` when there are merged adapters, please call "
            f"`unmerge_adapter` first. (Layer {merged!r} is merged.)"
        )
    return names


def _runs_again(module: nn.Module) -> bool:
    """Whether a module runs what is inside of it again in the backward pass."""
    return getattr(module, "gradient_checkpointing", False) is True or "_checkpoint_wrapped_module" in module._modules


@contextlib.contextmanager
def mixed_batch(tuner: Tuner, kwargs: dict[str, Any]) -> Iterator[None]:
    """Take `adapter_names` out of the arguments of a call, and run the call with those adapters."""
    adapter_names = kwargs.pop("adapter_names", None)
    if adapter_names is None:
        yield
        return
    copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
    parts = tuner._parts()
    names = _Names(check(tuner, parts, adapter_names), copies)
    changed: list[tuple[nn.Module, str, Any]] = []

    def restore() -> None:
        for module, attribute, value in changed:
            # `nn.Module.__setattr__` looks for parameters and modules everywhere first.
            module.__dict__[attribute] = value
            if attribute == "batch_adapters" and torch.is_grad_enabled():
                module.__dict__["_was_mixed"] = True

    with put_back(restore):
        # Everything else runs as the base model has it.
        for module in parts:
            if isinstance(module, (LoRALayer, TrainableTokens)):
                changed.append((module, "batch_adapters", module.batch_adapters))
                module.__dict__["batch_adapters"] = names
            else:
                changed.append((module, "disable_adapters", module.disable_adapters))
                module.__dict__["disable_adapters"] = True
        yield


__all__ = ["mixed_batch"]
