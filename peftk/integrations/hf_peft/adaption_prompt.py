"""PEFT's Llama-Adapter on attention modules of the Llama family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...methods import adaption_prompt
from ..way import Forward, Way, plain
from .tuner_layer import unfit

_PROMPT = "peft.tuners.adaption_prompt"


class Attention(Way):
    """Attention modules with projections of their own for queries, keys and values."""

    method = "adaption_prompt"
    layers = (f"{_PROMPT}.layer.AdaptedAttention",)
    operator = "scaled_dot_product_attention"
    copied = (
        f"{_PROMPT}.utils.llama_compute_query_states",
        f"{_PROMPT}.utils.llama_rotate_half",
    )

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        if layer.model_type not in ("llama", "mistral"):
            return f"the query of {layer.model_type}"
        model = layer.model
        heads, size = model.config.num_attention_heads, model.head_dim
        if model.q_proj.out_features != heads * size or model.k_proj.in_features != heads * size:
            return "heads of another size than PEFT assumes"
        prompt, gate = layer.adaption_prompt, layer.adaption_gate
        dtype = None if x is None or x.dtype == prompt.dtype else "a prompt in another dtype than its input"
        return dtype or unfit(layer, None, [prompt, gate]) or [(prompt, gate)]

    def run(self, layer: Any, x: Tensor, adapters: list[Any], **kwargs: Any) -> Any:
        """See `Way.run`."""
        model = layer.model
        output, *rest = model(**kwargs)
        (prompt, gate) = adapters[0]
        key, value = model.k_proj(prompt), model.v_proj(prompt)
        query = model.q_proj(x)
        added = adaption_prompt.share(query, key, value, gate, model.head_dim, kwargs["position_embeddings"])
        result = output + model.o_proj(added)
        return result.to(query.dtype), *rest

    def around(self, original: Forward, here: Callable[[Any], bool]) -> Forward:
        """See `Way.around`."""

        def forward(layer: Any, **kwargs: Any) -> Any:
            x = kwargs.get("hidden_states")
            if x is not None and here(layer) and plain(x) and kwargs.get("position_embeddings") is not None:
                found = self.adapters(layer, x)
                if type(found) is list and not kwargs.get("output_attention"):
                    return self.run(layer, x, found, **kwargs)
            return original(layer, **kwargs)

        return forward
