"""What the arithmetic of all methods asks of a frozen layer: its kind and sizes, and how its output is reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of a weight that is not packed."""

NONE: Mapping[str, Any] = {}
"""No keyword arguments; nobody writes to it."""

_FEATURES = {
    "Linear": ("in_features", "out_features"),
    "Conv1D": ("nx", "nf"),
    "Conv2d": ("in_channels", "out_channels"),
    "Embedding": ("num_embeddings", "embedding_dim"),
}


def kind_of(layer: nn.Module) -> str | None:
    """Return which kind of layer this is: "Linear", "Conv1D", "Conv2d", "Embedding" or None.

    Conv1D is the linear layer of GPT-2, which stores its weight as (in, out).
    """
    for kind in ("Linear", "Conv2d", "Embedding"):
        if isinstance(layer, getattr(nn, kind)):
            return kind
    # Without importing transformers; a parametrized layer is of a class of its own.
    found = any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(layer).__mro__)
    return "Conv1D" if found else None


def features_of(layer: nn.Module) -> tuple[int, int]:
    """Return the input and output size of a layer: its features or channels."""
    kind = kind_of(layer)
    if kind is None:
        raise TypeError(f"base_layer: expected one of {', '.join(_FEATURES)}, got {type(layer).__name__}")
    inputs, outputs = _FEATURES[kind]
    return getattr(layer, inputs), getattr(layer, outputs)


def rows_of(base: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight of the base layer with the outputs as rows: (out, in), or (out, in, height, width)."""
    return weight if isinstance(base, (nn.Linear, nn.Conv2d)) else weight.mT


def opaque_weight(layer: Any) -> str | None:
    """Name the type of a weight that is not dense and floating-point, as a quantised one, or return None if it is."""
    weight = layer.weight
    if type(weight) is not nn.Parameter and type(weight).__name__ != "DTensor" and type(weight) is not Tensor:
        return type(weight).__name__
    return None if weight.dtype in DENSE else str(weight.dtype)


def foreign_forward(layer: nn.Module) -> str | None:
    """Name the class whose `forward` a layer has if that is not the one of its kind, or return None.

    Such a layer may compute something else from its weight. Embeddings that scale what they have looked up are known.
    """
    kind = kind_of(layer)
    own = type(layer).forward
    if kind is None or own in (nn.Linear.forward, nn.Conv2d.forward, nn.Embedding.forward):
        return None
    owner = next(c for c in type(layer).__mro__ if "forward" in c.__dict__)
    if kind == "Conv1D" and owner.__name__ == "Conv1D":
        return None
    if kind == "Embedding" and hasattr(layer, "embed_scale"):
        return None
    return owner.__qualname__


def call(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call a linear base layer.

    Raises:
        RuntimeError: The layer is quantised, and x needs a gradient that its backward pass does not give.
    """
    result = layer(x, *args, **kwargs)
    if x.requires_grad and not result.requires_grad and torch.is_grad_enabled() and opaque_weight(layer) is not None:
        raise RuntimeError(
            f"base_layer: this {type(layer).__name__}, whose weight is {opaque_weight(layer)}, passes no gradient to "
            "its input, so what comes before it would be trained wrongly; quantise weights alone and not activations, "
            "or run it under torch.no_grad()"
        )
    return result


def observed(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether somebody would notice that modules of an adapter are not called: hooks, or other forwards than their own.

    Args:
        kind: The class that they have where nobody has replaced or wrapped them.
        *modules: Those of whose parameters the arithmetic is done elsewhere.
    """
    for module in modules:
        if (
            type(module) is not kind
            or "forward" in module.__dict__
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return True
    return False


def plain_tensors(
    base: Any, x: Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NONE
) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a plain dense nn.Linear or nn.Conv2d whose call nobody observes or replaces, or None.

    With them an operator may run the layer itself. Anything else is reached by calling it, so that hooks, sharding,
    quantisation and nested wrappers keep working. Under autocast torch caches the cast of the weight, which only the
    call profits from.
    """
    linear = type(base) is nn.Linear
    if not (linear or type(base) is nn.Conv2d) or args or kwargs:
        return None
    own, parameters = base.__dict__, base._parameters
    # FSDP puts views of its flat parameter beside the parameters. A parametrized weight is in neither place.
    weight = own["weight"] if "weight" in own else parameters.get("weight")
    if (
        (type(weight) is nn.Parameter or type(weight) is Tensor)
        and not weight.requires_grad
        and weight.dtype is x.dtype
        and (weight.shape == (base.out_features, base.in_features) if linear else weight.dim() == 4)
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
        and not base._backward_pre_hooks
        and not _has_any_global_hook()
        and "forward" not in own
        and not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type))
    ):
        return weight, own["bias"] if "bias" in own else parameters["bias"]
    return None
