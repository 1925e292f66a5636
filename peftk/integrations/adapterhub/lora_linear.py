"""AdapterHub's linear layers with one active adapter: LoRA, DoRA or (IA)^3."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from ... import functional as F
from ...kernels.shared.wide import HALF
from ...methods import lora, magnitudes
from ...methods._base_layer import DENSE, observed
from ...methods.lora import LowRank
from ..fingerprints import Fingerprints, name_of
from ..way import Way, bare

FINGERPRINTS = Fingerprints(Path(__file__).with_name("fingerprints.json"), "adapters")

_LORA = "adapters.methods.lora"
_BASE = "adapters.methods.adapter_layer_base"


class Active(NamedTuple):
    """The active adapter.

    Attributes:
        low_rank: Its factors and scale, or None for (IA)^3.
        dropout_p: The probability of dropout, which is drawn here as AdapterHub draws it.
        magnitude: DoRA's magnitudes, (out, 1), or None.
        factor: (IA)^3's factor of every output, or None.
    """

    low_rank: LowRank | None
    dropout_p: float
    magnitude: Tensor | None = None
    factor: Tensor | None = None


class Linear(Way):
    """Linear layers whose active setup is one adapter without gating."""

    method = "lora"
    layers = (f"{_LORA}.LoRALinearTorch",)
    operator = "low_rank_linear"
    copied = (
        f"{_LORA}.LoRALinear.compose_single",
        f"{_LORA}.LoRA.forward",
        f"{_LORA}.LoRA.com",
        f"{_LORA}.LoRA.delta_w.fget",
        f"{_BASE}.AdapterLayerBase.get_active_setup",
        f"{_BASE}.ComposableAdapterLayerBase.compose",
        f"{_BASE}.ComposableAdapterLayerBase.compose_stack",
        f"{_BASE}.ComposableAdapterLayerBase.pre_block",
    )
    copied_by_some = (
        f"{_LORA}.IA3.forward",
        f"{_LORA}.IA3.com",
        f"{_LORA}.compute_dora_norm",
        f"{_LORA}.compute_dora_deltaw",
    )

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        if layer.merged:
            return "an adapter is merged"
        if layer.fan_in_fan_out:
            return "a weight that stores its inputs first"
        setup = layer.get_active_setup()
        if setup is None:
            return "no adapter is active now; one that becomes so is accelerated"
        if type(setup).__name__ != "Stack" or len(setup) != 1 or not isinstance(setup[0], str):
            return f"a composition of adapters ({type(setup).__name__})"
        module = layer._modules["loras"]._modules[setup[0]]
        kind = name_of(type(module))
        if kind not in (f"{_LORA}.LoRA", f"{_LORA}.IA3"):
            return f"an adapter of the class {type(module).__name__}"
        if module.use_gating:
            return "gating"
        if observed(type(module), module):
            return "a hook or another forward is on a module of the adapter"
        if (kind.endswith("IA3") or module.use_dora) and (unknown := self.unknown(self.copied_by_some)) is not None:
            return unknown
        found = self._scaling(module) if kind.endswith("IA3") else self._adding(module)
        if isinstance(found, str):
            return found
        if found.factor is not None and x is not None and x.dim() != 3:
            return "an input of another shape"
        return _unfit(layer, x, found) or [found]

    @staticmethod
    def _adding(module: Any) -> Active | str:
        dropout = module.__dict__.get("lora_dropout", module._modules.get("lora_dropout"))
        p = 0.0
        if isinstance(dropout, nn.Module):
            if observed(nn.Dropout, dropout):
                return "a hook or another forward is on a module of the adapter"
            p = float(dropout.p) if dropout.training else 0.0  # type: ignore[arg-type]  # nn.Module types what it finds.
        low_rank = LowRank(module.lora_A, module.lora_B, float(module.scaling))
        return Active(low_rank, p, module.m.weight if module.use_dora else None)

    @staticmethod
    def _scaling(module: Any) -> Active:
        return Active(None, 0.0, factor=module.lora_B.view(-1) * module.scaling)

    def run(self, layer: Any, x: Tensor, adapters: list[Any]) -> Tensor:
        """See `Way.run`."""
        low_rank, p, magnitude, factor = adapters[0]
        base = bare(layer, nn.Linear)
        if low_rank is None:
            return F.scale_channels(base(x), factor)
        y = lora.linear(base, x, [low_rank]) if p == 0 else lora.add(base(x), tf.dropout(x, p), low_rank)
        if magnitude is None:
            return y
        a, b, scale = low_rank[:3]
        norms = magnitudes.low_rank_norms(base.weight, a, b, scale if self.correct else 1.0)
        # There the bias is scaled too.
        return F.scale_channels(y, magnitude.view(-1) / norms, base.bias if self.correct else None)

    def note(self, layer: Any) -> str | None:
        """See `Way.note`."""
        found = self.adapters(layer, None)
        if not isinstance(found, list) or found[0].magnitude is None:
            return None
        if self.correct:
            return "correct=True: DoRA's norm is that of the scaled update, and the bias is not scaled"
        return "DoRA's norm is that of the unscaled update, and the bias is scaled, as adapters has it"

    def example(self, layer: Any, adapters: list[Any]) -> tuple[Any, ...] | None:
        """See `Way.example`."""
        low_rank, weight, bias = adapters[0].low_rank, layer.weight, layer.bias
        if low_rank is None or weight.dtype not in DENSE or weight.is_meta:
            return None
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        x = weight.new_empty(512, weight.shape[1])
        return x, weight, bias, low_rank.a.detach(), low_rank.b.detach(), 1.0


def _unfit(layer: Any, x: Tensor | None, found: Active) -> str | None:
    tensors = [t for t in (found.magnitude, found.factor) if t is not None]
    if found.low_rank is not None:
        tensors += found.low_rank[:2]
    if any(t.numel() == 0 or t.is_meta for t in tensors):
        return "a parameter of the adapter is sharded or offloaded"
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1:
        return "the parameters of the adapter have several dtypes"
    if found.magnitude is not None and layer.weight.requires_grad:
        return "DoRA on a weight that is trained"
    if x is None:
        return None
    if any(t.device != x.device for t in tensors):
        return "the adapter is on another device than its input"
    (dtype,) = dtypes
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    if found.magnitude is not None and (autocast or dtype is not layer.weight.dtype):
        return "DoRA on a weight of another dtype, or under autocast"
    if dtype is x.dtype or (x.dtype in HALF and dtype is torch.float32) or (autocast and torch.float64 not in dtypes):
        return None
    return f"an adapter in {dtype} on an input in {x.dtype}"
