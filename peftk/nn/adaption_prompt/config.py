"""The configuration of Llama-Adapter, and the attention modules that it knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..base.config import Form, PeftConfig, PeftType, check_int

MAX_LENGTH = 1_000_000
MAX_LAYERS = 1_000_000


class Attention(NamedTuple):
    """How one kind of attention module is built.

    Attributes:
        target: The name of the module in a layer of the model.
        query: The projection whose output holds the query.
        keys: The projections that turn a prompt into keys and values; one of them if it makes query, key and value.
        output: The projection that the prompts' share goes through with the rest; None adds it to the output.
    """

    target: str
    query: str
    keys: tuple[str, ...]
    output: str | None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all projections."""
        return tuple(dict.fromkeys((self.query, *self.keys, *([self.output] if self.output else []))))


_LLAMA = Attention("self_attn", "q_proj", ("k_proj", "v_proj"), "o_proj")
ATTENTIONS = {"llama": _LLAMA, "mistral": _LLAMA, "gpt2": Attention("attn", "c_attn", ("c_attn",), None)}
"""The attention modules that can have adaption prompts, by the `model_type` of a transformers model."""


@dataclass
class AdaptionPromptConfig(PeftConfig, method=PeftType.ADAPTION_PROMPT):
    """Configuration of Llama-Adapter, with the fields and defaults of PEFT 0.21.

    ``attention(x) + gate * softmax(q(x) k(P)^T / sqrt(head_dim)) v(P)`` in the top `adapter_layers` layers, with a
    prompt P and a gate of each layer's own.

    Args:
        target_modules: Name of the attention module in a layer; None takes that of the model's type.
        adapter_len: Number of vectors of a prompt; at most the context of the model. An adapter needs it.
        adapter_layers: Number of layers that get a prompt, counted from the last. An adapter needs it.

    Source: Zhang et al., LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention,
    arXiv 2303.16199.

    Example:
        >>> from peftk import AdaptionPromptConfig
        >>> AdaptionPromptConfig(adapter_len=10, adapter_layers=30, task_type="CAUSAL_LM").adapter_len
        10
    """

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    _forms = (Form("Llama-Adapter", {"adapter_len": 3, "adapter_layers": 1}),)
    _meaning = ("adapter_len", "adapter_layers")
    # The wrapped attention hides its projections from other methods.
    _alone = True

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            raise TypeError(
                f"target_modules: expected the name of the attention module or None, got {self.target_modules!r}"
            )
        if self.target_modules == "":
            raise ValueError("target_modules: expected the name of the attention module or None, got ''")
        if self.adapter_len is not None:
            check_int("adapter_len", self.adapter_len, 1, MAX_LENGTH)
        if self.adapter_layers is not None:
            check_int("adapter_layers", self.adapter_layers, 1, MAX_LAYERS)

    @property
    def is_adaption_prompt(self) -> bool:
        """True."""
        return True

    def find_targets(self, kind: str | None, names: Iterable[str]) -> list[str]:
        """Return the attention modules of the top layers among a model's module names, and fill in their name.

        Args:
            kind: The `model_type` of the model.
            names: The names of its modules, in their order.

        Raises:
            ValueError: The kind of model is not supported, or it has fewer layers than `adapter_layers`.
        """
        if kind not in ATTENTIONS:
            raise ValueError(
                f"adaption prompts: models of type {kind!r} are not supported; supported are {sorted(ATTENTIONS)}"
            )
        if self.target_modules is None:
            self.target_modules = ATTENTIONS[kind].target
        self._check_complete()
        assert self.adapter_layers is not None
        found = [name for name in names if name.endswith(f".{self.target_modules}")]
        if not found:
            raise ValueError(
                f"target_modules: no module of the model has the name {self.target_modules!r}; the attention of models "
                f"of type {kind!r} is called {ATTENTIONS[kind].target!r}"
            )
        if self.adapter_layers > len(found):
            raise ValueError(
                f"adapter_layers: expected at most {len(found)}, the number of modules called "
                f"{self.target_modules!r}, got {self.adapter_layers}"
            )
        return found[-self.adapter_layers :]

    def _check_complete(self) -> None:
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}: expected a number from 1, got None; an adaption prompt needs it")


__all__ = ["ATTENTIONS", "AdaptionPromptConfig", "Attention"]
