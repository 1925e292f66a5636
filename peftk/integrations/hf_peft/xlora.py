"""PEFT's X-LoRA, whose objects replace the `forward` of LoRA's layers: all experts in one product."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...methods import xlora
from ...methods._base_layer import observed
from ...methods.lora import LowRank
from ..exchange import switch_off, wrapped
from ..way import Forward, Way, forward_of, plain
from . import lora
from .lora import dropout_of, scale_of
from .tuner_layer import NONE_ACTIVE, SHARED, held, parameter, unfit

_LAYER = "peft.tuners.xlora.layer"


class Experts(Way):
    """Layers with experts; a subclass is a kind of base layer."""

    method = "xlora"
    copied: ClassVar[tuple[str, ...]] = (*SHARED, f"{_LAYER}.XLoraLayer.apply_scalings_to_x")
    holder: ClassVar[str]
    """The container of the experts' A in a layer of LoRA."""

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`; the layer is PEFT's object that has replaced its `forward`."""
        target = layer.target
        found: list[Any] = []
        for index, name in enumerate(target.active_adapters):
            if name not in target._modules[self.holder]:
                continue
            scale = scale_of(target, name)
            if type(scale) is not float:
                return "a scale that is no number"
            # Embeddings without DoRA do not name it.
            if target.use_dora.get(name, False):
                return "X-LoRA has no DoRA"
            expert = self.expert(target, name, scale)
            if type(expert) is str:
                return expert
            found.append((index, expert))
        if not found:
            return NONE_ACTIVE
        return self.unfit_base(target, x, [p for _, expert in found for p in expert[:2]]) or found

    def expert(self, target: Any, name: str, scale: float) -> LowRank | str:
        """Return the factors of an expert, or why PEFT's own code runs."""
        raise NotImplementedError

    def unfit_base(self, target: Any, x: Tensor | None, parameters: list[Any]) -> str | None:
        """Say why the arithmetic cannot take the layer as it is, or return None."""
        raise NotImplementedError

    def shape_fits(self, target: Any, x: Tensor) -> bool:
        """Whether the input has the shape for which the experts' weights are made."""
        raise NotImplementedError

    def joined(self, base: Any, x: Tensor, experts: list[LowRank], gate: Tensor) -> Tensor:
        """Return the output of the base layer with all experts."""
        raise NotImplementedError

    def run(self, layer: Any, x: Tensor, adapters: list[Any], scalings: Tensor | None = None) -> Tensor:
        """See `Way.run`; with the weights of the experts, (batch, tokens, layers, experts)."""
        weight = 1.0 if scalings is None else layer.config.global_scaling_weight
        gates = []
        chosen = None if scalings is None else layer.get_maybe_topk_scalings(scalings)
        for index, expert in adapters:
            like = expert.a.new_full((1,), expert.scale * weight)
            gate = like if chosen is None else chosen[:, :, index, None].to(like.dtype) * like
            gates.append(gate.expand(*gate.shape[:-1], len(expert.a)))
        base = layer.target._modules["base_layer"]
        return self.joined(base, x, [expert for _, expert in adapters], torch.cat(gates, -1))

    def around(self, original: Forward, here: Callable[[Any], bool]) -> Forward:
        """See `Way.around`."""

        def forward(layer: Any, x: Any, *args: Any, scalings: Any = None, **kwargs: Any) -> Any:
            target = layer.target
            usual = (
                not args
                and not kwargs
                and here(layer)
                and not getattr(layer, "adapters_disabled", False)
                and not target.merged_adapters
            )
            if usual and plain(x) and self.shape_fits(target, x):
                found = self.adapters(layer, x)
                if type(found) is list and (scalings is None or scalings.shape[:2] == x.shape[:2]):
                    return self.run(layer, x, found, scalings)
            return original(layer, x, *args, scalings=scalings, **kwargs)

        return forward


class Linear(Experts):
    """Linear layers."""

    layers = (f"{_LAYER}.XLoraLinearLayer",)
    operator = "low_rank_linear"
    holder = "lora_A"

    def expert(self, target: Any, name: str, scale: float) -> LowRank | str:
        """See `Experts.expert`."""
        modules = target._modules
        a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        if dropout_of(modules["lora_dropout"]._modules[name]) != 0:
            return "dropout of an expert, or a hook on it"
        if observed(nn.Linear, a, b) or b.bias is not None:
            return "a hook or another forward is on a module of the adapter, or it has a bias"
        return LowRank(parameter(a), parameter(b), scale)

    def unfit_base(self, target: Any, x: Tensor | None, parameters: list[Any]) -> str | None:
        """See `Experts.unfit_base`."""
        return unfit(target, x, parameters)

    def shape_fits(self, target: Any, x: Tensor) -> bool:
        """See `Experts.shape_fits`."""
        return x.dim() == 3 and x.shape[-1] == target.in_features

    def joined(self, base: Any, x: Tensor, experts: list[LowRank], gate: Tensor) -> Tensor:
        """See `Experts.joined`."""
        return xlora.linear(base, x, experts, gate).to(x.dtype)


class Embedding(Experts):
    """Embeddings."""

    layers = (f"{_LAYER}.XLoraEmbeddingLayer",)
    operator = "embedding"
    holder = "lora_embedding_A"
    copied = (*Experts.copied, *lora.Embedding.copied)

    def expert(self, target: Any, name: str, scale: float) -> LowRank | str:
        """See `Experts.expert`."""
        modules = target._modules
        return LowRank(held(modules["lora_embedding_A"])[name], held(modules["lora_embedding_B"])[name], scale)

    def unfit_base(self, target: Any, x: Tensor | None, parameters: list[Any]) -> str | None:
        """See `Experts.unfit_base`."""
        return lora.unfit_embedding(target, x, parameters)

    def shape_fits(self, target: Any, x: Tensor) -> bool:
        """See `Experts.shape_fits`."""
        return x.dim() == 2

    def joined(self, base: Any, x: Tensor, experts: list[LowRank], gate: Tensor) -> Tensor:
        """See `Experts.joined`."""
        return xlora.embedding(base, x, experts, gate)


def replaced(layer: nn.Module) -> Any:
    """Return the object of X-LoRA that has replaced the `forward` of a layer, or None."""
    forward = layer.__dict__.get("forward")
    owner = getattr(forward, "__self__", None)
    return owner if type(owner).__module__ == _LAYER else None


def exchange(layer: nn.Module, way: Way) -> None:
    """Give a layer whose `forward` is X-LoRA's another one: PEFT keeps a bound method in the layer."""
    owner = replaced(layer)
    layer.forward = types.MethodType(wrapped(forward_of(type(owner)), way), owner)


def restore(layer: nn.Module) -> bool:
    """Give a layer X-LoRA's `forward` back; say whether it had another one."""
    owner = replaced(layer)
    forward: Any = layer.__dict__.get("forward")
    # What it has from the class is undone there.
    if owner is None or not hasattr(forward, "_peftk_original") or forward.__func__ is type(owner).forward:
        return False
    switch_off(forward)
    layer.forward = types.MethodType(forward._peftk_original, owner)
    return True
