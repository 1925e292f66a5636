"""Rows of an embedding that an adapter of another method trains beside its own layers, for new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..methods import trainable_tokens
from ..methods.trainable_tokens import Tokens
from .base.adapter_layer import Adapter, AdapterLayer
from .base.kinds import HALF
from .base.merging import Merged
from .base.offloading import onloaded

_ROWS = "trainable_tokens_delta"


class TrainableTokens(AdapterLayer):
    """An nn.Embedding, or an nn.Linear of the same weight, some of whose rows are trained: `trainable_token_indices`.

    Rows replace those of the base weight, they are not added to them, so that it does not matter what a new token has
    in another copy of the base model. At first they are those of the weight.

    Parameters per adapter: `trainable_tokens_delta.<name>` (n, dim), in the order of `token_indices[<name>]`. PEFT
    calls the module around them `token_adapter`, in its files too.

    Args:
        base_layer: The layer; it is frozen.
        module_name: The path of the layer in its model.

    Raises:
        TypeError: `base_layer` is no dense nn.Embedding or nn.Linear.
        ValueError: An index is not one of its rows, or the embedding has `max_norm` or `scale_grad_by_freq`.

    Example:
        >>> import torch
        >>> from peftk.nn.trainable_tokens import TrainableTokens
        >>> base = torch.nn.Embedding(10, 4)
        >>> layer = TrainableTokens.around(base)
        >>> layer.attach("default", TrainableTokens.of_rows(base, [8, 9]))
        >>> layer.set_adapter("default")
        >>> layer(torch.tensor([1, 9])).shape
        torch.Size([2, 4])
    """

    base_kinds = ("Embedding", "Linear")
    adapter_layer_names = (_ROWS,)
    parameter_names = frozenset(adapter_layer_names)
    file_names: ClassVar[dict[str, str]] = {_ROWS: f"token_adapter.{_ROWS}"}
    other_param_names = ("token_indices",)

    def _wrap(self, base_layer: nn.Module, module_name: str) -> None:
        super()._wrap(base_layer, module_name)
        self._on_device: dict[str, tuple[list[int], Tensor]] = {}

    @property
    def token_adapter(self) -> TrainableTokens:
        """This layer: PEFT keeps the rows in a module of that name."""
        return self

    @classmethod
    def of_rows(
        cls,
        base_layer: Any,
        indices: Sequence[int],
        module_name: str = "",
        *,
        autocast_adapter_dtype: bool = True,
        initialise: bool = True,
    ) -> Adapter:
        """Create the parameters of one adapter, as `AdapterLayer.make` does for other methods.

        Args:
            base_layer: The layer whose rows are trained.
            indices: Which ones; each once.
            module_name: The path of the layer in its model.
            autocast_adapter_dtype: Keep the rows in float32 on a half-precision base.
            initialise: Give them the values of the weight; without it they have no memory yet.
        """
        where = f"trainable_token_indices: module {module_name!r}"
        with onloaded([base_layer]):
            reason = cls.refusal(base_layer)
            if reason is None and base_layer.weight.dtype not in _FLOATING:
                reason = f"its weight is {base_layer.weight.dtype}, whose rows cannot be trained"
            if reason is not None:
                raise TypeError(f"{where} is a {type(base_layer).__name__}, whose rows cannot be trained: {reason}")
            cls._check_rows(base_layer, indices, where)
            weight = base_layer.weight
            if initialise and weight.is_meta:
                raise ValueError(f"{where}: its weight is on the meta device; load the base model before its adapters")
            wide = torch.float32 if autocast_adapter_dtype and weight.dtype in HALF else weight.dtype
            if initialise:
                rows = weight.detach()[torch.tensor(list(indices), device=weight.device)].to(wide)
            else:
                rows = torch.empty(len(indices), weight.shape[1], dtype=wide, device="meta")
            parts: dict[str, nn.Module | nn.Parameter] = {_ROWS: nn.Parameter(rows)}
            return Adapter(parts, {"token_indices": list(indices)}, cls, weight.device)

    @staticmethod
    def _check_rows(base_layer: Any, indices: Sequence[int], where: str) -> None:
        wrong = [index for index in indices if index >= base_layer.weight.shape[0]]
        if wrong:
            raise ValueError(
                f"{where} has {base_layer.weight.shape[0]} rows, and {wrong[0]} is none of them; call "
                "resize_token_embeddings of the base model first"
            )
        if getattr(base_layer, "max_norm", None) is not None or getattr(base_layer, "scale_grad_by_freq", False):
            raise ValueError(
                f"{where} has max_norm={base_layer.max_norm} and scale_grad_by_freq={base_layer.scale_grad_by_freq}; "
                "only embeddings without them are supported"
            )

    def tokens(self, name: str) -> Tokens:
        """Return the tensors of one adapter, as its arithmetic takes them."""
        rows, indices = getattr(self, _ROWS)[name], self.token_indices[name]
        kept, found = self._on_device.get(name, (None, None))
        if kept is not indices or found is None or found.device != rows.device:
            found = torch.tensor(indices, device=rows.device)
            # Once, because a copy to a device waits and cannot be captured.
            self._on_device[name] = indices, found
        return Tokens(found, rows)

    def check_set_adapter(self, adapter_names: Sequence[str]) -> None:
        """Raise ValueError if two of these adapters train the same row."""
        owner: dict[int, str] = {}
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in dict.fromkeys(names):
            for index in self.token_indices.get(name, ()):
                if index in owner:
                    raise ValueError(
                        f"adapter_names: {owner[index]!r} and {name!r} both train the row of token {index} of module "
                        f"{self.module_name!r}, so that they cannot be active together"
                    )
                owner[index] = name

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """See `AdapterLayer.set_adapter`; adapters of a common row cannot be active together."""
        self.check_set_adapter([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        super().set_adapter(adapter_names, inference_mode)

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if adapters of a common row, or of one that is merged, are to be merged together."""
        names = self._to_merge(adapter_names)
        if names:
            self.check_set_adapter([*self.merged_adapters, *names])
        super().check_merge(adapter_names)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        run = trainable_tokens.embedding if self.kind == "Embedding" else trainable_tokens.linear
        return run(self.base_layer, x, [self.tokens(name) for name in names], args, kwargs)

    def _mixed(self, x: Tensor, names: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        names = names.of(len(x)) if hasattr(names, "of") else names
        replace: Any = trainable_tokens.replace_looked_up
        if self.kind != "Embedding":
            replace = trainable_tokens.replace_products
        for name in dict.fromkeys(names):
            if name in self.token_indices:
                samples = torch.tensor([other == name for other in names], device=x.device)
                result = replace(self.base_layer, result, x, self.tokens(name), samples)
        return result

    def _merge_into(self, tensors: Merged, name: str) -> None:
        tensors["weight"] = trainable_tokens.merged(tensors["weight"], self.tokens(name))


class TiedTokens(TrainableTokens):
    """A layer whose weight is that of an embedding with trained rows, and whose rows are the same parameters.

    What is merged is merged into the one weight by the embedding, and what is saved is saved with it.
    """

    def _merge_into(self, tensors: Merged, name: str) -> None:
        """Leave the weight to the embedding."""


_FLOATING = (torch.float64, torch.float32, *HALF)

__all__ = ["TiedTokens", "TrainableTokens"]
