"""OFT on embeddings: what was looked up is rotated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..methods import oft
from .base.merging import Merged
from .oft import OFTLinear


class OFTEmbedding(OFTLinear):
    """An nn.Embedding whose rows are rotated by OFT adapters: ``y = W[x] R``.

    Parameters per adapter: `oft_embedding_R.<name>.weight` (blocks, b (b - 1) / 2), over the features. Several active
    adapters rotate one after another, in the order in which they are active; merging keeps that order.

    Args:
        base_layer: The nn.Embedding to adapt; it is frozen.
        config: An OFTConfig.
        adapter_name: The name of the first adapter.
        module_name: The path of the layer in its model.
        autocast_adapter_dtype: Keep parameters in float32 on a half-precision base.

    Raises:
        TypeError: `base_layer` is not a dense nn.Embedding.

    Source: Qiu et al., arXiv 2506.19847.

    Example:
        >>> import torch, peftk
        >>> layer = peftk.nn.OFTEmbedding(torch.nn.Embedding(10, 8), peftk.OFTConfig(oft_block_size=4))
        >>> layer(torch.tensor([1, 2])).shape
        torch.Size([2, 8])
    """

    base_kinds = ("Embedding",)
    adapter_layer_names = ("oft_embedding_R",)

    @staticmethod
    def _rotated_features(base_layer: Any, module_name: str) -> int:
        return int(base_layer.embedding_dim)

    def _merge_order(self, names: list[str]) -> list[str]:
        return names

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        # An embedding keeps its dtype under autocast, which would round the rows here.
        with torch.autocast(result.device.type, enabled=False):
            for rotation in self._rotations(names):
                result = rotation(result)
        return result

    def _merge_into(self, tensors: Merged, name: str) -> None:
        tensors["weight"] = oft.rotated(tensors["weight"], self._blocks_to_merge(tensors, name))


__all__ = ["OFTEmbedding"]
