"""What the arithmetic of all methods asks of a frozen layer: its kind and sizes, and how its output is reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.plain import CONVOLUTIONS, DENSE, NONE, listened_to, observed, plain_tensors, stored, unobserved


class Few(NamedTuple):
    """What a dense nn.Linear with an adapter does with few rows, `unobserved`.

    Attributes:
        run: Returns the output, or None where operators have to run. It holds the tensors of the layer and the adapter,
            and reads them anew in every call.
        rows: The number of rows beyond which that is always None.
    """

    run: Callable[[Tensor], Tensor | None]
    rows: int


_FEATURES = {
    "Linear": ("in_features", "out_features"),
    "Conv1D": ("nx", "nf"),
    "Conv1d": ("in_channels", "out_channels"),
    "Conv2d": ("in_channels", "out_channels"),
    "Conv3d": ("in_channels", "out_channels"),
    "Embedding": ("num_embeddings", "embedding_dim"),
}

_FORWARDS = frozenset(layer.forward for layer in (nn.Linear, *CONVOLUTIONS, nn.Embedding))


def kind_of(layer: nn.Module) -> str | None:
    """Return which kind of layer this is: "Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", None.

    Conv1D is the linear layer of GPT-2, which stores its weight as (in, out), and Conv1d a convolution.
    """
    for kind in ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"):
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
    """Return a weight of the base layer with the outputs as rows: (out, in), or (out, in, *kernel)."""
    return weight if isinstance(base, (nn.Linear, *CONVOLUTIONS)) else weight.mT


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
    if kind is None or own in _FORWARDS:
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


__all__ = [
    "CONVOLUTIONS",
    "DENSE",
    "NONE",
    "Few",
    "call",
    "features_of",
    "foreign_forward",
    "kind_of",
    "listened_to",
    "observed",
    "opaque_weight",
    "plain_tensors",
    "rows_of",
    "stored",
    "unobserved",
]
