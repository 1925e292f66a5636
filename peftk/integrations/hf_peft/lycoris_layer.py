"""What PEFT's LoHa and LoKr share: their draws of dropout."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Draw(NamedTuple):
    """What PEFT's dropout of one adapter does in one pass.

    Attributes:
        on: Whether the adapter acts at all.
        kept: (out,), which rows of the update stay; None for all of them.
    """

    on: bool
    kept: Tensor | None = None


def draws(layer: Any, names: list[str], rows: int) -> list[Draw]:
    """Draw as PEFT draws, in its order: one number for every adapter in training, then the rows of its update."""
    found = []
    for name in names:
        if not layer.training:
            found.append(Draw(True))
            continue
        # A compiler has a random stream of its own, and cannot branch on a tensor.
        skips = torch.compiler.is_compiling() and layer.module_dropout[name] == 0
        if not skips and not bool(torch.rand(1) > layer.module_dropout[name]):
            found.append(Draw(False))
            continue
        p = layer.rank_dropout[name]
        found.append(Draw(True, torch.rand(rows) > p if p else None))
    return found


def unfit_base(layer: Any, x: Tensor | None) -> str | None:
    """Say why the base layer of a LoHa or LoKr layer is left to PEFT, or return None."""
    base = layer._modules["base_layer"]
    # Below another adapter's layer a linear layer is called, and then added to.
    if isinstance(layer.get_base_layer(), nn.Linear):
        return None if x is None or x.shape[-1:] == (layer.in_features,) else "an input of another size"
    if type(base) is not nn.Conv2d:
        return f"the base layer is a {type(base).__name__}"
    if base.padding_mode != "zeros":
        return "PEFT ignores the padding mode of the convolution"
    if x is not None and (x.dim() not in (3, 4) or x.shape[-3] != base.in_channels):
        return "an input of another shape"
    return None
