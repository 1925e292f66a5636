"""What LyCORIS's modules share: the layer that they stand before, and which of their calls are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.shared.wide import HALF
from ...methods._base_layer import CONVOLUTIONS, DENSE
from ...methods.magnitudes import Magnitudes
from ..fingerprints import Fingerprints
from ..way import Way, bare

FINGERPRINTS = Fingerprints(Path(__file__).with_name("fingerprints.json"), "lycoris-lora")

_BASE = "lycoris.modules.base.LycorisBaseModule"
_GENERAL = "lycoris.functional.general"

SHARED = (f"{_BASE}._current_weight", f"{_BASE}.apply_to", f"{_BASE}.restore")
"""What the `forward` of every module asks, and what binds it to a layer."""

DECOMPOSED = (f"{_GENERAL}.weight_decompose", f"{_GENERAL}._weight_decompose")
"""What DoRA asks beside."""


class Call(NamedTuple):
    """What one call of a module computes with.

    Attributes:
        base: The layer as if the module did not stand before it, or None where something else does too.
        adapter: The tensors and settings of the adapter.
        magnitudes: Those of DoRA, or None.
    """

    base: Any
    adapter: Any
    magnitudes: Magnitudes | None


class NetworkModuleWay(Way):
    """A module of a LyCORIS network, which stands before a linear layer or a convolution."""

    copied_by_some: ClassVar[tuple[str, ...]] = DECOMPOSED

    parameter_names: tuple[str, ...]
    """What may be among the parameters of the adapter."""

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        why = _drops(layer) or self.unfit(layer, x)
        if why is not None:
            return why
        base, magnitudes = _behind(layer), _magnitudes(layer)
        if layer.training and layer.rank_dropout and (base is None or not self.drops_rows(layer)):
            return "rank_dropout in training"
        changes = magnitudes is not None or self.changes_weight(layer)
        if base is None and (changes or not self.adds_to_output(layer)):
            return "another adapter, or another function, stands before the layer"
        if changes and not _frozen(layer.org_module[0]):
            return "a weight that is trained, or that is not dense"
        if magnitudes is not None and (unknown := self.unknown(self.copied_by_some)) is not None:
            return unknown
        return [Call(base, self.adapter(layer), magnitudes)]

    def adapter(self, layer: Any) -> Any:
        """Return the tensors and settings of the adapter, the strength of the network in them."""
        raise NotImplementedError

    def drops_rows(self, layer: Any) -> bool:
        """Whether `run` does what rank_dropout does to the update."""
        return False

    def run(self, layer: Any, x: Tensor, adapters: list[Any]) -> Tensor:
        """See `Way.run`."""
        # Drawn as LyCORIS draws, and in its order.
        if layer.training and layer.module_dropout and bool(torch.rand(1) < layer.module_dropout):
            return base_output(layer, x)
        return self.adapted(layer, x, adapters[0])

    def adapted(self, layer: Any, x: Tensor, call: Call) -> Tensor:
        """Return the output of a layer with its adapter."""
        raise NotImplementedError

    def changes_weight(self, layer: Any) -> bool:
        """Whether the adapter takes the weight for a constant, of which it makes another one."""
        return False

    def adds_to_output(self, layer: Any) -> bool:
        """Whether the adapter adds to the output, whatever has made that."""
        return layer.module_type == "linear"

    def factors(self, layer: Any) -> list[Tensor]:
        """Return the parameters of the adapter."""
        own = layer._parameters
        return [own[name] for name in self.parameter_names if own.get(name) is not None]

    def unfit(self, layer: Any, x: Tensor | None) -> str | None:
        """Say why the arithmetic cannot take a module as it is, or return None."""
        if type(layer.multiplier) not in (float, int):
            return "a multiplier that is no number"
        org = layer.org_module[0]
        if layer.module_type == "linear":
            if not isinstance(org, nn.Linear):
                return f"the base layer is a {type(org).__name__}"
        elif type(org) not in CONVOLUTIONS:
            return f"the base layer is a {type(org).__name__}"
        elif org.padding_mode != "zeros":
            return "LyCORIS ignores the padding mode of the convolution"
        factors = self.factors(layer)
        for p in factors:
            if type(p) is not nn.Parameter or p.numel() == 0 or p.is_meta:
                return "a parameter of the adapter is sharded or offloaded"
            if x is not None and p.device != x.device:
                return "the adapter is on another device than its input"
        dtypes = {p.dtype for p in factors}
        if len(dtypes) > 1:
            return "the parameters of the adapter have several dtypes"
        return None if x is None else _unfit_dtype(layer, x, *dtypes)


def _unfit_dtype(layer: Any, x: Tensor, dtype: torch.dtype) -> str | None:
    weight = layer.org_module[0].weight.dtype
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return "float64 under autocast" if torch.float64 in (x.dtype, weight, dtype) else None
    if weight in DENSE and weight is not x.dtype:
        return f"a weight in {weight} and an input in {x.dtype}"
    if dtype is x.dtype or (x.dtype in HALF and dtype is torch.float32 and _magnitudes(layer) is None):
        return None
    return f"an adapter in {dtype} on an input in {x.dtype}"


def _drops(layer: Any) -> str | None:
    dropout = layer.dropout
    # LoCon's is a module.
    drops = type(dropout) is not nn.Identity if isinstance(dropout, nn.Module) else bool(dropout)
    return "dropout in training, which acts in bypass_mode" if drops and layer.training and layer.bypass_mode else None


def drawn_rows(layer: Any, device: torch.device | None = None) -> tuple[Tensor, float | Tensor] | None:
    """Draw which rows of the update rank_dropout keeps: (out,) and the mean by which they are divided, or None."""
    if not layer.training or not layer.rank_dropout:
        return None
    kept = torch.rand(layer.shape[0], device=device) > layer.rank_dropout
    return kept, kept.float().mean() if layer.rank_dropout_scale else 1.0


def _magnitudes(layer: Any) -> Magnitudes | None:
    if not getattr(layer, "wd", False) or layer.bypass_mode:
        return None
    return Magnitudes(layer.dora_scale, bool(layer.wd_on_out), float(layer.multiplier))


def strength(layer: Any) -> float:
    """Return the factor of an update: with DoRA the multiplier scales the whole change instead."""
    return 1.0 if _magnitudes(layer) is not None else float(layer.multiplier)


def _frozen(org: Any) -> bool:
    weight = org._parameters.get("weight")
    return type(org) in (nn.Linear, *CONVOLUTIONS) and (
        type(weight) is nn.Parameter and not weight.requires_grad and weight.dtype in DENSE
    )


def _behind(layer: Any) -> Any:
    """Return the layer that a module stands before, as it would be without, or None if something else is there too."""
    org: Any = layer.org_module[0]
    kind: Any = type(org)
    before = layer.org_forward
    if getattr(before, "__self__", None) is not org or before.__func__ is not kind.forward:
        return None
    # LyCORIS puts a module's `forward` into the layer, and the layer has called its hooks when that runs.
    return bare(org, kind)


def base_output(layer: Any, x: Tensor) -> Tensor:
    """Return what the layer, and the adapters that stand between, make of an input."""
    y: Tensor = layer.org_forward(x)
    return y


def example_weight(layer: Any) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return an input of 512 rows without values, weight and bias of a plain linear layer, or None."""
    org = layer.org_module[0]
    weight = org._parameters.get("weight")
    if type(org) is not nn.Linear or type(weight) is not nn.Parameter or weight.dtype not in DENSE or weight.is_meta:
        return None
    bias = org.bias
    weight = weight.detach()
    return weight.new_empty(512, weight.shape[1]), weight, None if bias is None else bias.detach()
