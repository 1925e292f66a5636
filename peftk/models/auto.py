"""A saved adapter with its base model, which the configuration names, in one call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from ..checkpoint.hub import split_hub_arguments
from ..nn import PeftConfig
from .peft_model import PeftModel

_LIBRARIES = ("transformers", "diffusers", "sentence_transformers")


class AutoPeftModel:
    """Loads a base model by `transformers`, and an adapter onto it; not to be made itself.

    `from_pretrained` of this class takes the class of the base model from the field `auto_mapping` of the adapter, if
    it is one of `transformers`, `diffusers` or `sentence_transformers`; a subclass names a task instead.
    """

    _auto_class: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__}: expected a call of {type(self).__name__}.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter names, and the adapter onto it.

        Args:
            pretrained_model_name_or_path: The folder or repository of the adapter.
            adapter_name: The name that the adapter gets.
            is_trainable: Whether it can be trained further.
            config: The configuration in place of that of the folder.
            revision: The revision of the base model; None takes that of the configuration.
            import_allowlist: Further libraries whose classes may be imported; the code of a named one is run.
            **kwargs: For the `from_pretrained` of the base model; those that say where a folder is, for the adapter.

        Raises:
            ValueError: The configuration names no base model, or a class that is not to be imported.
        """
        where, others = split_hub_arguments(kwargs)
        found = PeftConfig.from_pretrained(pretrained_model_name_or_path, **where) if config is None else config
        base_name = found.base_model_name_or_path
        if not base_name:
            raise ValueError(
                f"base_model_name_or_path: missing from the configuration of {pretrained_model_name_or_path!r}; load "
                "the base model yourself and call PeftModel.from_pretrained"
            )
        base = cls._base_class(found, import_allowlist)
        for_base = {name: value for name, value in where.items() if name != "subfolder"}
        model = base.from_pretrained(base_name, revision=revision or found.revision or "main", **for_base, **others)
        return PeftModel.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable, config=config, **where
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, allowed: Sequence[str] | None) -> Any:
        if cls._auto_class is not None:
            return getattr(importlib.import_module("transformers"), cls._auto_class)
        mapping = config.auto_mapping or {}
        library, name = mapping.get("parent_library"), mapping.get("base_model_class")
        if not isinstance(library, str) or not isinstance(name, str):
            raise ValueError(
                "auto_mapping: expected the class of the base model, which the configuration does not name; use the "
                "AutoPeftModel class of its task"
            )
        if library.partition(".")[0] not in (*_LIBRARIES, *(allowed or ())):
            raise ValueError(
                f"auto_mapping: the configuration names {library}.{name}, and only classes of {', '.join(_LIBRARIES)} "
                "are imported, for importing runs code; name the library in import_allowlist if you trust it"
            )
        return getattr(importlib.import_module(library), name)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """An `AutoPeftModel` for causal language models."""

    _auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An `AutoPeftModel` for encoder-decoder models."""

    _auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """An `AutoPeftModel` for classifiers of sequences."""

    _auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """An `AutoPeftModel` for classifiers of tokens."""

    _auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """An `AutoPeftModel` for extractive question answering."""

    _auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An `AutoPeftModel` for encoders without a head."""

    _auto_class = "AutoModel"


__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]
