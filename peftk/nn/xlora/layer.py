"""X-LoRA: LoRA experts side by side in one low-rank product, weighted for every token by a classifier."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...methods import xlora
from ...methods.lora import LowRank
from ..base.adapter_layer import AdapterLayer
from ..base.undo import put_back
from ..lora.conv import LoRAConv
from ..lora.embedding import LoRAEmbedding
from ..lora.linear import LoRALinear
from .config import XLoraConfig


class XLoraClassifier(nn.Module):
    """Predicts the weights of the experts from the last hidden state of the base model.

    Parameters: `layers.<i>.weight` and `layers.<i>.bias`; in between ReLU and, with `xlora_dropout_p`, dropout.

    Args:
        config: The configuration.
        experts: Number of experts.
        layers: Number of adapted layers.
    """

    def __init__(self, config: XLoraConfig, experts: int, layers: int) -> None:
        super().__init__()
        self.config = config
        self.experts = experts
        self.adapted = layers
        assert config.hidden_size is not None
        widths = [config.hidden_size] + [config.xlora_size] * (config.xlora_depth - 1)
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            parts += [nn.Linear(before, after), nn.ReLU()]
            if config.xlora_dropout_p > 0:
                parts.append(nn.Dropout(config.xlora_dropout_p))
        parts.append(nn.Linear(widths[-1], experts * layers if config.layerwise_scalings else experts))
        self.layers = nn.Sequential(*parts)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the weights, (batch, tokens, layers, experts), for hidden states (batch, tokens, hidden_size)."""
        logits = self.layers(hidden.to(next(self.layers[-1].parameters()).dtype))
        rows = self.adapted if self.config.layerwise_scalings else 1
        logits = logits.unflatten(-1, (rows, self.experts))
        if self.config.enable_softmax:
            logits = torch.softmax(logits / self.config.softmax_temperature, -1)
        return logits.expand(-1, -1, self.adapted, -1)


def select(weights: Tensor, config: XLoraConfig) -> Tensor:
    """Keep the `top_k_lora` largest weights of every token and, if asked, take the softmax of those that are left."""
    if config.top_k_lora is not None:
        kept = torch.zeros_like(weights, dtype=torch.bool)
        kept.scatter_(-1, torch.topk(weights, config.top_k_lora, dim=-1).indices, True)
        weights = weights * kept
    if config.enable_softmax_topk:
        left = weights != 0
        weights = torch.softmax(weights.masked_fill(~left, float("-inf")), -1).masked_fill(~left, 0.0)
    return weights


class Gates:
    """What the adapted layers of one model share: the weights of the experts in the pass that is running.

    Args:
        config: The configuration.
        experts: The names of the experts, in their order.
    """

    def __init__(self, config: XLoraConfig, experts: Sequence[str]) -> None:
        if isinstance(experts, str):
            raise TypeError(f"experts: expected a list of names, got {experts!r}")
        self.config = config
        self.experts = list(experts)
        self.latest: Tensor | None = None
        self.log: list[Tensor] = []
        self.logging = False
        # The selected weights of the pass that is running, None for one without experts, and the gates made of them.
        self.state: tuple[Tensor | None, dict[tuple[Any, ...], Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Tensors with a history can neither be copied nor pickled.
        return self.__dict__ | {"latest": None, "log": [], "state": None}

    @contextlib.contextmanager
    def using(self, weights: Tensor | None) -> Iterator[None]:
        """Run a pass with these weights, (batch, tokens, layers, experts) or (experts,), or without experts."""
        if weights is not None:
            shared = weights.dim() == 4 and not self.config.layerwise_scalings
            weights = select(weights[:, :, :1] if shared else weights, self.config)
        with self.resuming((weights, {})):
            yield

    @contextlib.contextmanager
    def resuming(self, state: tuple[Tensor | None, dict[tuple[Any, ...], Tensor]]) -> Iterator[None]:
        """Run a part of a pass, whose `state` was kept, once more."""
        before = self.state
        with put_back(lambda: setattr(self, "state", before)):
            self.state = state
            yield

    def of(self, layer: XLoraLayer) -> Tensor | None:
        """Return the gate of a layer, (batch, tokens, total rank) or (total rank,); None switches its experts off."""
        if self.state is None:
            raise RuntimeError(
                f"X-LoRA: layer {layer.module_name!r} was called outside of a forward pass of its PeftModel, so its "
                "experts have no weights; call the PeftModel (of checkpointing, only that of transformers models "
                "is supported)"
            )
        weights, made = self.state
        if weights is None:
            return None
        number = -1
        if weights.dim() == 4:
            # One gate serves every layer with the same experts, unless each has weights of its own.
            number = layer.number if self.config.layerwise_scalings else 0
            weights = weights[:, :, number]
        names = layer.expert_names()
        scales = [layer.scaling[name] for name in names]
        key = (number, *((name, layer.r[name], scale) for name, scale in zip(names, scales, strict=True)))
        if key not in made:
            factor = self.config.global_scaling_weight
            parts = []
            for name, scale in zip(names, scales, strict=True):
                index = self.experts.index(name)
                part = weights[..., index : index + 1] * (scale * factor)
                parts.append(part.expand(*part.shape[:-1], layer.r[name]))
            made[key] = torch.cat(parts, -1)
        return made[key]


class XLoraLayer(AdapterLayer):
    """What the adapted layers of an X-LoRA model have in common, beside what they are as LoRA layers."""

    gates: Gates

    def _wrap(self, base_layer: nn.Module, module_name: str) -> None:
        super()._wrap(base_layer, module_name)
        self.number = 0

    def expert_names(self) -> list[str]:
        """The names of the experts that this layer has, in their order."""
        return [name for name in self.gates.experts if name in self.scaling]

    def _with_mixed(
        self, x: Tensor, adapters: list[LowRank], choice: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        raise ValueError("adapter_names: the experts of an X-LoRA model act together and cannot be mixed in a batch")

    def _experts(self) -> list[LowRank]:
        self._check_unheard(self.expert_names(), "X-LoRA")
        return [self.low_rank(name) for name in self.expert_names()]

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError: the weights of the experts depend on the input."""
        raise ValueError(
            "merge: the experts of X-LoRA are weighted anew for every token, which no weight can hold; use unload to "
            "take them off the model"
        )


class XLoraLinear(XLoraLayer, LoRALinear):
    """A linear layer with LoRA experts: ``y = x W^T + bias + ((dropout(x) A^T) * gate) B^T``.

    A (total rank, in) and B (out, total rank) are the factors of all experts, one behind the other, and the gate
    (..., total rank) holds each expert's weight for the token times its scale: one product for all experts.
    """

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        gate = self.gates.of(self)
        if gate is None:
            return self.base_layer(x, *args, **kwargs)
        if gate.dim() > 1:
            gate = _fit(gate, x, self.module_name)
        return xlora.linear(self.base_layer, x, self._experts(), gate, args, kwargs)


def _fit(gate: Tensor, x: Tensor, where: str) -> Tensor:
    """Return the gate, (batch, tokens, total rank), in the leading shape of x, (..., features)."""
    positions = gate.shape[:2]
    if x.shape[:-1] == positions:
        return gate
    if x.dim() == 2 and x.shape[0] == positions.numel():
        return gate.flatten(0, 1)
    if x.dim() > 3 and x.shape[:2] == positions:
        between = x.shape[2:-1]
        return gate.view(*positions, *(1 for _ in between), -1).expand(*positions, *between, -1)
    raise ValueError(
        f"X-LoRA: the weights of the experts are for (batch, tokens) = {tuple(positions)}, and layer {where!r} got an "
        f"input of shape {tuple(x.shape)}, whose positions are others"
    )


class XLoraConv(XLoraLayer, LoRAConv):
    """A convolution with LoRA experts: ``y = conv(x, W) + bias + sum_i s_i B_i conv(g_i * dropout(x), A_i)``.

    The weights g are those of the hidden states' positions: as many as the input has places, in rows, or one for
    all of it. In the second case, and for a pointwise convolution, all experts run together.
    """

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        gate = self.gates.of(self)
        if gate is None:
            return self.base_layer(x, *args, **kwargs)
        if gate.dim() > 1:
            everywhere, size = gate.shape[1] > 1, x.shape[2:]
            tokens = size.numel() if everywhere else 1
            if x.dim() != 2 + len(self.base_layer.kernel_size) or gate.shape[:2] != (x.shape[0], tokens):
                raise ValueError(
                    f"X-LoRA: the weights of the experts are for (batch, tokens) = {tuple(gate.shape[:2])}, and layer "
                    f"{self.module_name!r} got an input of shape {tuple(x.shape)}; expected one token, or one for "
                    "each of its places"
                )
            gate = gate.unflatten(1, size if everywhere else (1,) * len(size)).movedim(-1, 1)
        return xlora.conv(self.base_layer, x, self._experts(), gate, args, kwargs)


class XLoraEmbedding(XLoraLayer, LoRAEmbedding):
    """An nn.Embedding with LoRA experts: ``y = base(x) + B (gate * A[:, x])`` with the factors of all experts."""

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        gate = self.gates.of(self)
        if gate is None:
            return self.base_layer(x, *args, **kwargs)
        if gate.dim() > 1:
            gate = _fit(gate, x.unsqueeze(-1), self.module_name)
        return xlora.embedding(self.base_layer, x, self._experts(), gate, args, kwargs)


GATED: dict[type[AdapterLayer], type[XLoraLayer]] = {
    LoRALinear: XLoraLinear,
    LoRAConv: XLoraConv,
    LoRAEmbedding: XLoraEmbedding,
}
"""The class that a layer of a LoRA expert has in an X-LoRA model."""

__all__ = [
    "GATED",
    "Gates",
    "XLoraClassifier",
    "XLoraConfig",
    "XLoraConv",
    "XLoraEmbedding",
    "XLoraLayer",
    "XLoraLinear",
]
