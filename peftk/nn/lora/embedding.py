"""LoRA on embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...methods import lora, lora_embedding
from ...methods.lora import LowRank
from ..base.adapter_layer import Adapter
from .config import LoraConfig
from .layer import LoRALayer
from .magnitude import Magnitude
from .start import starts_inside


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
        if config.dora_inputs:
            raise ValueError(
                f"dora_inputs: module {module_name!r} is an embedding, whose inputs are indices; expected False"
            )
        if base_layer.max_norm is not None:
            raise ValueError(
                f"target_modules: module {module_name!r} is an embedding with max_norm={base_layer.max_norm}, which "
                "changes its weight in its forward pass; only embeddings without it are supported"
            )
        if starts_inside(config.init_lora_weights):
            raise ValueError(
                f"init_lora_weights: module {module_name!r} is an embedding, for which "
                f"{config.init_lora_weights!r} has no meaning"
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

    def _extra_bias(self, name: str) -> None:
        return None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update of one adapter, (num, dim), without DoRA's scaling."""
        return lora.update(self.low_rank(adapter)).mT

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        for name in names:
            if self.use_dora[name]:
                self._check_dora_unheard(name)
        return lora_embedding.embedding(self.base_layer, x, [self.low_rank(name) for name in names], args, kwargs)

    def _with_mixed(
        self, x: Tensor, adapters: list[LowRank], choice: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        return lora_embedding.embedding_mixed(self.base_layer, x, adapters, choice, args, kwargs)


__all__ = ["LoRAEmbedding"]
