"""Embeddings of the base model that belong to an adapter's file, because the vocabulary was resized for training."""

from __future__ import annotations

import dis
import inspect
import json
import os
import sys
import warnings
from collections.abc import Container
from typing import Any

from torch import Tensor, nn

from ..nn.base.adapter_layer import AdapterLayer
from ..nn.base.saved import ModulesToSaveWrapper
from ..nn.trainable_tokens import TrainableTokens
from .file_keys import PREFIX, state_of
from .names import named_modules, unwrapped
from .plan import Plan
from .targets import candidates

_RESIZED = "save_embedding_layers: the vocabulary of the base model was resized"


def embedding_tensors(model: nn.Module, plan: Plan, *, copies: bool = False) -> dict[str, Tensor]:
    """Map the keys under which PEFT adds the input and output embeddings of a model to a file to their tensors.

    Args:
        model: The base model.
        plan: The adapter. Of a layer that it adapts, or trains in full, the original is meant.
        copies: Whether the copies that are trained in full, and trained rows of tied weights, are meant too, under
            their second names in PEFT's files.
    """
    found = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        method = getattr(unwrapped(model), getter, None)
        layer = method() if callable(method) else None
        if not isinstance(layer, nn.Module):
            continue
        module = unwrapped(layer)
        path = next((path for path, other in candidates(model).items() if other is module), None)
        if path is None:
            continue
        inner, original = path, module
        if isinstance(module, TrainableTokens) or path in plan.tokens or path in plan.tied:
            inner, original = f"{path}.token_adapter.base_layer", getattr(module, "base_layer", module)
        elif isinstance(module, AdapterLayer) or path in plan.adapters:
            inner, original = f"{path}.base_layer", getattr(module, "base_layer", module)
        elif isinstance(module, ModulesToSaveWrapper) or path in plan.saved:
            inner, original = f"{path}.original_module", getattr(module, "original_module", module)
        merged = getattr(module, "_original", {})
        for name, tensor in state_of(original):
            found[f"{PREFIX}{inner}.{name}"] = merged.get(name, tensor)
        if copies and path in plan.saved:
            for name, tensor in state_of(plan.saved[path]):
                found[f"{PREFIX}{path}.modules_to_save.{name}"] = tensor
        if copies and path in plan.tied:
            for name, tensor in plan.tokens[plan.tied[path]].saved_tensors():
                found[f"{PREFIX}{path}.{name}"] = tensor
    return found


def embeddings_to_save(model: nn.Module, plan: Plan, choice: str | bool) -> dict[str, Tensor]:
    """Return the embeddings that a file needs, by the argument `save_embedding_layers`: "auto", True or False."""
    if choice is False:
        return {}
    if choice == "auto":
        reason = resized(model)
        if reason is None:
            return {}
    found = embedding_tensors(model, plan)
    if choice is True:
        if not found:
            raise ValueError(
                "save_embedding_layers: expected a model whose get_input_embeddings names a module of it, got "
                f"{type(unwrapped(model)).__name__}; pass False"
            )
        return found
    if found:
        warnings.warn(
            f"{_RESIZED} ({reason}); its embeddings are written to the file of the adapter too. Pass True or False to "
            "say whether they belong there",
            stacklevel=4,
        )
    return found


def resized(model: nn.Module) -> str | None:
    """Say how one sees that the vocabulary of a transformers model is not that of its base model, or return None.

    The configuration of the base model decides, if its folder or its place in the cache of the hub can be read; nothing
    is downloaded. Otherwise what `resize_token_embeddings` leaves in a model does.
    """
    model = unwrapped(model)
    size = _vocabulary(getattr(model, "config", None))
    if size is None or not callable(getattr(model, "get_input_embeddings", None)):
        return None
    saved = _saved_config(model.__dict__.get("name_or_path"))
    before = None if saved is None else _vocabulary_in(saved)
    if before is not None:
        return None if before == size else f"its configuration was saved with {before} entries and now says {size}"
    for path, module in named_modules(model):
        own = module.__dict__.get("vocab_size")
        now = _vocabulary(getattr(module, "config", None))
        if isinstance(own, int) and now is not None and own != now:
            return f"{path or 'the model'} was made for {own} entries, and its configuration says {now}"
    if "vocab_size" in model.__dict__ and not _sets_vocabulary(type(model)):
        return "resize_token_embeddings was called"
    return None


def tell_missing(model: nn.Module, plan: Plan, file: str, present: Container[str]) -> None:
    """Warn where the vocabulary was resized and the file of an adapter lacks embeddings that are part of it then."""
    tensors = embedding_tensors(model, plan)
    # Tied ones are one tensor, and of those that are trained in full the copy counts.
    held = {id(tensor) for key, tensor in tensors.items() if key in present}
    lacking = [key for key, tensor in tensors.items() if id(tensor) not in held and ".original_module." not in key]
    reason = resized(model) if lacking else None
    if reason is not None:
        warnings.warn(
            f"{file}: {', '.join(lacking)} are not in this file, but the model's vocabulary was resized ({reason}); "
            "for new tokens the adapter meets the rows that this model has. Save it with save_embedding_layers=True",
            stacklevel=5,
        )


def _vocabulary(config: Any) -> int | None:
    """Return the size of the vocabulary by a configuration, or by the part of it for text."""
    text = getattr(config, "get_text_config", None)
    for part in (config, text() if callable(text) else None):
        size = getattr(part, "vocab_size", None)
        if isinstance(size, int):
            return size
    return None


def _vocabulary_in(values: dict[str, Any]) -> int | None:
    for part in (values, values.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("vocab_size"), int):
            return part["vocab_size"]
    return None


def _saved_config(name: str | None) -> dict[str, Any] | None:
    """Read the configuration of a base model from its folder, or from the cache of the hub."""
    if not name:
        return None
    file = os.path.join(name, "config.json")
    hub = sys.modules.get("huggingface_hub")
    if not os.path.isfile(file) and hub is not None:
        try:
            file = hub.try_to_load_from_cache(name, "config.json")
        except ValueError:
            # What is neither a folder nor the name of a repository.
            return None
    if not isinstance(file, str) or not os.path.isfile(file):
        return None
    try:
        with open(file, encoding="utf-8") as stream:
            values = json.load(stream)
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _sets_vocabulary(cls: type) -> bool:
    """Whether a class of models sets `vocab_size` itself when it is made, so that its presence says nothing."""
    for base in cls.__mro__:
        code: Any = inspect.unwrap(base.__dict__.get("__init__", object.__init__))
        if not hasattr(code, "__code__"):
            continue
        if any(i.opname == "STORE_ATTR" and i.argval == "vocab_size" for i in dis.get_instructions(code)):
            return True
    return "vocab_size" in vars(cls)


__all__ = ["embedding_tensors", "embeddings_to_save", "resized"]
