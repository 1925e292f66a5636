"""LoRA on embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from ... import functional as F
from ..base.adapter_layer import Adapter
from .config import LoraConfig
from .dora import Magnitude
from .layer import LoRALayer


class LoRAEmbedding(LoRALayer):
    """An nn.Embedding with LoRA adapters: ``y = base(x) + s * B A[:, x]``, times `embed_scale` where the layer has one.

    With `use_dora`: ``y = g * (base(x) + s * B A[:, x])``, ``g = m / ||W^T + s B A||``, one factor for each feature.
    `lora_dropout` has no meaning here and does nothing, as in PEFT.

    Parameters per adapter: `lora_embedding_A.<name>` (r, num), zero at first, `lora_embedding_B.<name>` (dim, r), and
    with `use_dora` `lora_magnitude_vector.<name>.weight` (dim,). The row `padding_idx` gets no gradient.

    Args:
        base_layer: The nn.Embedding to adapt; it is frozen.
        config: A LoraConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not a dense nn.Embedding.
        ValueError: It has `max_norm`, or `lora_bias` is set.

    Source: Hu et al., arXiv 2106.09685; Liu et al., arXiv 2402.09353.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.LoRAEmbedding(torch.nn.Embedding(10, 4), peftk.LoraConfig(r=2))
        >>> layer(torch.tensor([1, 2])).shape
        torch.Size([2, 4])
    """

    base_kinds = ("Embedding",)
    adapter_layer_names = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    parameter_names = frozenset({"lora_embedding_A", "lora_embedding_B"})

    @classmethod
    def _create(cls, base_layer: nn.Module, config: LoraConfig, module_name: str, initialise: bool) -> Adapter:
        if config.lora_bias:
            raise ValueError(f"lora_bias: module {module_name!r} is an embedding, which has no bias; expected False")
        if base_layer.max_norm is not None:
            raise ValueError(
                f"target_modules: module {module_name!r} is an embedding with max_norm={base_layer.max_norm}, which "
                "changes its weight in its forward pass; only embeddings without it are supported"
            )
        settings = cls._settings(config, module_name)
        number, features = base_layer.num_embeddings, base_layer.embedding_dim
        make = torch.randn if initialise else torch.empty
        a, b = make(settings["r"], number), make(features, settings["r"])
        if initialise and config.init_lora_weights:
            nn.init.zeros_(a)
            nn.init.normal_(b)
        parts = {"lora_embedding_A": nn.Parameter(a), "lora_embedding_B": nn.Parameter(b)}
        if config.use_dora:
            parts["lora_magnitude_vector"] = Magnitude(features)
        return Adapter(parts, settings)

    @staticmethod
    def _factors_of(parts: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return parts["lora_embedding_A"], parts["lora_embedding_B"]

    @staticmethod
    def _rows_of(weight: Tensor, base_layer: nn.Module) -> Tensor:
        return weight.mT

    def _extra_bias(self, name: str) -> None:
        return None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update of one adapter, (num, dim), without DoRA's scaling."""
        a, _ = self._pair(adapter)
        return self._delta(adapter, a.dtype).mT

    def _look_up(self, x: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the columns of A (r, num) that x names, (..., r)."""
        base = self.base_layer
        hidden = tf.embedding(x, a.mT, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq).to(
            dtype
        )
        # Some embeddings, such as Gemma's, scale what they have looked up.
        scale = getattr(base, "embed_scale", None)
        return hidden if scale is None else hidden * torch.as_tensor(scale, dtype=dtype, device=hidden.device)

    def _added(self, result: Tensor, hidden: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
        rows = result.reshape(-1, result.shape[-1])
        if isinstance(scale, Tensor):
            b, scale = b * scale, 1.0
        hidden = hidden.reshape(-1, hidden.shape[-1])
        # An embedding keeps its dtype under autocast, which would round the base output here.
        with torch.autocast(rows.device.type, enabled=False):
            return torch.addmm(rows, hidden, b.to(hidden.dtype).mT, alpha=scale).view(result.shape)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            a, b = self._pair(name)
            if self.use_dora[name]:
                g = self._gain(name)
                result = F.scale_channels(result, g)
                b = b * g.unsqueeze(1)
            result = self._added(result, self._look_up(x, a, result.dtype), b, self.scaling[name])
        return result

    def _mixed(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for group in self._mixed_groups(names):
            a = torch.cat([self.lora_embedding_A[name] for name in group])
            b = torch.cat([self.lora_embedding_B[name] for name in group], dim=1)
            gate = self._table(group, names, {name: self.r[name] for name in group}, result)
            hidden = self._look_up(x, a, result.dtype) * gate.view(len(gate), *[1] * (x.dim() - 1), -1)
            result = self._added(result, hidden, b, 1.0)
        return result


__all__ = ["LoRAEmbedding"]
