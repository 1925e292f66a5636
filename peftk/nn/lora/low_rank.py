"""What LoRA and AdaLoRA share on linear layers: the update ``scale * (B * gate) A`` in its two forms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import functional as F
from ..base.adapter_layer import AdapterLayer
from ..base.kinds import call


def low_rank_delta(a: Tensor, b: Tensor, scale: float | Tensor = 1.0, *, gate: Tensor | None = None) -> Tensor:
    """Return the dense update ``scale * (B * gate) A`` of shape (out, in), in the dtype of the factors."""
    return ((b if gate is None else b * gate) @ a) * scale


class LowRankLinear(AdapterLayer):
    """A linear layer with additive low-rank adapters; a method says what its factors are."""

    base_kinds = ("Linear", "Conv1D")

    def _factors(self, name: str) -> tuple[Tensor, Tensor, float | Tensor, Tensor | None]:
        """Return A (r, in), B (out, r), the scale and the gate (r,) or None of an adapter; r may be 0."""
        raise NotImplementedError

    def _extra_bias(self, name: str) -> Tensor | None:
        """Return what an adapter adds to the bias, or None."""
        return None

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result = None
        if not self._can_fuse(x, args, kwargs):
            result = call(self.base_layer, x, *args, **kwargs)
            if x.dtype != result.dtype:
                x = x.to(result.dtype)
        for name in names:
            result = self._add(result, x, name)
        return self.base_layer(x) if result is None else result

    def _add(self, result: Tensor | None, x: Tensor, name: str) -> Tensor | None:
        """Add an adapter to a result, or to that of the base layer, which is then computed with it, if it is None."""
        a, b, scale, gate = self._factors(name)
        if a.shape[0] == 0:
            return result
        p = self.lora_dropout[name] if self.training else 0.0
        options = {"dropout_p": p} if p > 0 else {}
        if gate is not None:
            options["gate"] = gate
        if result is None:
            frozen = self._modules["base_layer"]._parameters
            result = F.low_rank_linear(x, frozen["weight"], frozen["bias"], a, b, scale, **options)
        else:
            result = F.low_rank_add(result, x, a, b, scale, **options)
        bias = self._extra_bias(name)
        return result if bias is None else result + bias.to(result.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update of one adapter, (out, in), in the adapter's dtype."""
        a, b, scale, gate = self._factors(adapter)
        return low_rank_delta(a, b, scale, gate=gate)

    def _merge_into(self, tensors: dict[str, Tensor], name: str) -> None:
        weight = tensors["weight"]
        a, b, scale, gate = self._factors(name)
        a, b, gate = (None if t is None else t.to(weight.dtype) for t in (a, b, gate))
        tensors["weight"] = weight + low_rank_delta(a, b, scale, gate=gate)
        bias = self._extra_bias(name)
        if bias is not None:
            tensors["bias"] = tensors["bias"] + bias.to(weight.dtype)
