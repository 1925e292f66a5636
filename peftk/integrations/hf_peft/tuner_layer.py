"""What PEFT's layers share: their adapters, the dtypes that they bring together, and when their base is reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.shared.wide import HALF
from ...methods._base_layer import CONVOLUTIONS, DENSE
from ..fingerprints import Fingerprints
from ..way import Way, plain

FINGERPRINTS = Fingerprints(Path(__file__).with_name("fingerprints.json"), "peft")

NONE_ACTIVE = "no adapter is active now; one that becomes so is accelerated"

SHARED = (
    "peft.tuners.tuners_utils.BaseTunerLayer.disable_adapters.fget",
    "peft.tuners.tuners_utils.BaseTunerLayer.merged.fget",
    "peft.tuners.tuners_utils.BaseTunerLayer.active_adapters.fget",
    "peft.tuners.tuners_utils.BaseTunerLayer._cast_input_dtype",
)
"""What the `forward` of every layer asks."""


class TunerWay(Way):
    """Layers that PEFT switches and merges."""

    def usual(self, layer: Any, x: Any) -> bool:
        """See `Way.usual`."""
        return plain(x) and not layer._disable_adapters and not layer.merged_adapters


def dense_weight(layer: Any) -> Tensor | None:
    """Return the weight of a base layer that is a plain nn.Linear or convolution, or None."""
    base = layer._modules["base_layer"]
    if type(base) not in (nn.Linear, *CONVOLUTIONS):
        return None
    weight = parameter(base)
    plain = type(weight) is nn.Parameter or type(weight) is Tensor
    # What is sharded is no matrix outside the forward pass.
    usable = plain and weight.dtype in DENSE and weight.dim() > 1 and not weight.is_meta
    return weight.detach() if usable else None


def plain_example(layer: Any) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return an input of 512 rows without values, weight and bias of a plain nn.Linear base layer, or None."""
    weight = dense_weight(layer)
    if weight is None:
        return None
    bias = layer._modules["base_layer"].bias
    return weight.new_empty(512, weight.shape[1]), weight, None if bias is None else bias.detach()


def active(layer: Any, found: Any) -> list[str]:
    """Return the active adapters among those that a container or a dictionary has."""
    names = layer._active_adapter
    if type(names) is str:
        return [names] if names in found else []
    return [name for name in names if name in found]


def parameter(module: nn.Module, name: str = "weight") -> Any:
    """Return a parameter of a module, which FSDP keeps as a plain attribute while it runs."""
    own = module.__dict__
    return own[name] if name in own else module._parameters.get(name)


def held(container: Any) -> Any:
    """Return the entries of a ParameterDict by name, which FSDP keeps as plain attributes while it runs."""
    parameters = container._parameters
    keys = container._keys
    return parameters if len(parameters) == len(keys) else {name: getattr(container, name) for name in keys}


def unfit(layer: Any, x: Tensor | None, parameters: Sequence[Any]) -> str | None:
    """Say why the arithmetic cannot take the parameters of an adapter as they are, or return None.

    Args:
        layer: The layer.
        x: Its input, or None to look at the layer alone.
        parameters: The parameters.
    """
    dtype = None
    for p in parameters:
        if type(p) is not nn.Parameter and type(p) is not Tensor:
            return f"a parameter of the adapter is a {type(p).__name__} now"
        if p.numel() == 0:
            return "the adapter has an empty parameter, as ZeRO-3 and FSDP leave where they keep a shard"
        if p.device.type == "meta":
            return "a parameter of the adapter is on the meta device, as offloading leaves it"
        if x is not None and p.device != x.device:
            return "the adapter is on another device than its input"
        if dtype is not None and p.dtype != dtype:
            return "the parameters of the adapters have several dtypes"
        dtype = p.dtype
    if x is None or dtype is x.dtype:
        return None
    if not (x.dtype in HALF and dtype is torch.float32):
        return f"an adapter in {dtype} on an input in {x.dtype}"
    return None if getattr(layer, "cast_input_dtype_enabled", True) else "casting of the input is switched off"
