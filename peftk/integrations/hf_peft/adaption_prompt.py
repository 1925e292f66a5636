"""PEFT's Llama-Adapter on the attention modules of llama, mistral and gpt2 models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from ...methods import adaption_prompt
from ...methods._base_layer import kind_of, observed
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


class GPT2Attention(Way):
    """Attention modules that make queries, keys and values with one projection."""

    method = "adaption_prompt"
    layers = (f"{_PROMPT}.layer.AdaptedAttentionGPT",)
    operator = "scaled_dot_product_attention"
    copied = (f"{_PROMPT}.utils.gpt2_compute_query_states",)

    def adapters(self, layer: Any, x: Tensor | None) -> list[Any] | str:
        """See `Way.adapters`."""
        model = layer.model
        if layer.model_type != "gpt2" or getattr(model, "is_cross_attention", False):
            return f"the query of {layer.model_type}, or of an encoder"
        if model.split_size != layer.num_heads * model.head_dim:
            return "heads of another size than PEFT assumes"
        prompt, gate = layer.adaption_prompt, layer.adaption_gate
        dtype = None if x is None or x.dtype == prompt.dtype else "a prompt in another dtype than its input"
        return dtype or unfit(layer, None, [prompt, gate]) or [(prompt, gate)]

    def run(self, layer: Any, x: Tensor, adapters: list[Any], **kwargs: Any) -> Any:
        """See `Way.run`."""
        model = layer.model
        output, *rest = model(hidden_states=x, **kwargs)
        (prompt, gate) = adapters[0]
        _, key, value = model.c_attn(prompt).chunk(3, -1)
        query = _query(model.c_attn, x, model.split_size)
        added = adaption_prompt.share(query, key, value, gate, model.head_dim)
        return ((output + added).to(query.dtype), *rest)

    def around(self, original: Forward, here: Callable[[Any], bool]) -> Forward:
        """See `Way.around`."""

        def forward(layer: Any, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
            usual = not args and "layer_past" not in kwargs and kwargs.get("encoder_hidden_states") is None
            if usual and here(layer) and plain(hidden_states) and hidden_states.dim() == 3:
                found = self.adapters(layer, hidden_states)
                if type(found) is list:
                    return self.run(layer, hidden_states, found, **_UNSAID | kwargs)
            return original(layer, hidden_states, *args, **kwargs)

        return forward


_UNSAID = {
    "attention_mask": None,
    "head_mask": None,
    "encoder_hidden_states": None,
    "encoder_attention_mask": None,
    "use_cache": False,
    "output_attentions": False,
}
"""What PEFT hands to the attention module where the caller says nothing."""


def _query(projection: Any, x: Tensor, size: int) -> Tensor:
    """Return the query alone, the first `size` columns of what a projection makes."""
    kind, weight = type(projection), projection._parameters.get("weight")
    # An adapter, quantised weights and hooks want a call of the projection.
    if kind.__name__ != "Conv1D" or kind_of(projection) != "Conv1D" or type(weight) is not nn.Parameter:
        return projection(x)[..., :size]
    if observed(kind, projection):
        return projection(x)[..., :size]
    return linear(x, weight[:, :size].mT, projection.bias[:size])
