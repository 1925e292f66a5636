"""The strength of the adapters of a whole model for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..nn import AdapterLayer
from ..nn.base.config import check_number
from ..nn.base.undo import put_back


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the `scaling` of every adapter of a model inside a block.

    Args:
        model: A model with adapters of a method that has a scale: LoRA, AdaLoRA, LoHa or LoKr.
        multiplier: The factor.

    Raises:
        TypeError: `multiplier` is no number.
        ValueError: No adapter of the model has a scale.
    """
    check_number("multiplier", multiplier, -1e9, 1e9)
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer) and "scaling" in m.other_param_names]
    if not layers:
        raise ValueError("model: expected adapters with a scale (LoRA, AdaLoRA, LoHa or LoKr), got none")
    before = [dict(layer.scaling) for layer in layers]

    def restore() -> None:
        for layer, scaling in zip(layers, before, strict=True):
            # An adapter that was deleted meanwhile stays deleted.
            layer.scaling.update({name: scale for name, scale in scaling.items() if name in layer.scaling})

    with put_back(restore):
        for layer in layers:
            layer.scaling.update({name: scale * multiplier for name, scale in layer.scaling.items()})
        yield


__all__ = ["rescale_adapter_scale"]
