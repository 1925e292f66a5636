"""What LoRA's layers share: settings, DoRA's magnitudes, merging, and batches that mix adapters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional as F
from ..base.adapter_layer import Adapter, AdapterLayer
from .config import LoraConfig
from .dora import gain

# Adapters of one batch share a product as long as their ranks together stay at or below this.
_MIXED_RANK = 256
BASE = "__base__"


class LoRALayer(AdapterLayer):
    """A layer with LoRA adapters, each of them plain or DoRA; a subclass is a kind of base layer."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_magnitude_vector")
    file_names = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}  # noqa: RUF012 - a ClassVar of the base
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora")
    config_class = LoraConfig

    def _wrap(self, base_layer: nn.Module) -> None:
        super()._wrap(base_layer)
        # The adapter of every sample, while a batch that mixes adapters runs.
        self.batch_adapters: Sequence[str] | None = None

    @classmethod
    def make(
        cls,
        base_layer: nn.Module,
        config: LoraConfig,
        module_name: str = "",
        *,
        autocast_adapter_dtype: bool = True,
        initialise: bool = True,
    ) -> Adapter:
        """See `AdapterLayer.make`; DoRA's magnitudes are the norms of the adapted weight, never rounded to half."""
        if config.use_dora and initialise and "weight" in base_layer.__dict__:
            raise NotImplementedError(
                f"use_dora: the weight of module {module_name!r} is computed by a hook whenever the layer is called "
                "(as by torch.nn.utils.weight_norm), and DoRA needs its norms before; use "
                "torch.nn.utils.parametrizations.weight_norm, or remove it"
            )
        options = {"autocast_adapter_dtype": autocast_adapter_dtype, "initialise": initialise}
        adapter = super().make(base_layer, config, module_name, **options)
        if config.use_dora and initialise:
            magnitude = adapter.parts["lora_magnitude_vector"].weight
            with torch.no_grad():
                magnitude.copy_(cls._first_norms(base_layer, adapter).view_as(magnitude))
        return adapter

    def check_add(self, config: LoraConfig) -> None:
        """Raise ValueError if the norms of the base weight are needed and adapters are merged into it."""
        if config.use_dora and self.merged_adapters:
            raise ValueError(
                f"use_dora: a new DoRA adapter starts at the norms of the base weight, and {self.merged_adapters} are "
                "merged into it; unmerge first"
            )

    @classmethod
    def _first_norms(cls, base_layer: nn.Module, adapter: Adapter) -> Tensor:
        # As in the forward pass, so that the gain of a fresh adapter is one to the bit.
        return cls._norms(base_layer, *cls._factors_of(adapter.parts), adapter.settings["scaling"])

    @classmethod
    def _norms(cls, base_layer: nn.Module, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
        """Return the norms of the rows of the adapted weight, (out,)."""
        weight = cls._rows_of(base_layer.weight, base_layer)
        if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            # The order of the columns changes no norm, and this one copies no weight.
            weight, a = weight.permute(0, 2, 3, 1), a.permute(0, 2, 3, 1)
        return F.dora_norm(weight.flatten(1), a.flatten(1), b.flatten(1), scale)

    @classmethod
    def _settings(cls, config: LoraConfig, module_name: str) -> dict[str, Any]:
        r = config.rank_pattern.get(config.pattern_key(config.rank_pattern, module_name), config.r)
        alpha = config.alpha_pattern.get(config.pattern_key(config.alpha_pattern, module_name), config.lora_alpha)
        return {
            "r": r,
            "lora_alpha": alpha,
            "scaling": alpha / math.sqrt(r) if config.use_rslora else alpha / r,
            "lora_dropout": float(config.lora_dropout),
            "use_dora": config.use_dora,
        }

    @staticmethod
    def _warn_about_bias(base_layer: nn.Module, config: LoraConfig, module_name: str) -> None:
        if config.lora_bias and base_layer.bias is None:
            warnings.warn(
                f"lora_bias: module {module_name!r} has no bias, so this adapter can never be merged", stacklevel=2
            )

    # -- what a subclass says ---------------------------------------------------------------------------------

    @staticmethod
    def _factors_of(parts: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return A and B among the parts of an adapter."""
        return parts["lora_A"].weight, parts["lora_B"].weight

    @staticmethod
    def _rows_of(weight: Tensor, base_layer: nn.Module) -> Tensor:
        """Return a weight of the base layer so that its rows are the outputs."""
        return weight

    def _mixed(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    # -- DoRA -------------------------------------------------------------------------------------------------

    def _gain(self, name: str) -> Tensor:
        """Return DoRA's factor of every output, (out,)."""
        norms = self._norms(self.base_layer, *self._pair(name), self.scaling[name])
        return gain(self.lora_magnitude_vector[name].weight, norms)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        containers = (self.adapter_layer_names[0], self.adapter_layer_names[1])
        return self._factors_of({c: getattr(self, c)[name] for c in containers})

    # -- merging ----------------------------------------------------------------------------------------------

    def _merge_order(self, names: list[str]) -> list[str]:
        # All add to the output; DoRA also scales what the adapters before it have made of it.
        return names

    def _extra_bias(self, name: str) -> Tensor | None:
        """Return what an adapter adds to the bias, or None."""
        bias = getattr(self.lora_B[name], "bias", None)
        return None if bias is None else bias * self.scaling[name]

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if an adapter has a bias and the base layer none, or if nothing can be merged into it."""
        super().check_merge(adapter_names)
        for name in self._to_merge(adapter_names):
            if self._extra_bias(name) is not None and self.bias is None:
                raise ValueError(
                    f"merge: adapter {name!r} has a bias (lora_bias=True) but the base layer has none to merge it into"
                )

    def _delta(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the dense update with the outputs as rows."""
        a, b = (t.to(dtype).flatten(1) for t in self._pair(name))
        return (b @ a) * self.scaling[name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update of one adapter, (out, in) or as a convolution's weight, without DoRA's scaling."""
        a, _ = self._pair(adapter)
        shape = (self.out_features, *a.shape[1:])
        return self._delta(adapter, a.dtype).view(shape)

    def _merge_into(self, tensors: dict[str, Tensor], name: str) -> None:
        weight = self._rows_of(tensors["weight"], self.base_layer) if self.kind == "Embedding" else tensors["weight"]
        delta = self._delta(name, weight.dtype).view(weight.shape)
        merged = weight + delta
        if self.use_dora[name]:
            original = self._rows_of(self._original.get("weight", self.base_layer.weight), self.base_layer)
            adapted = original.to(device=weight.device, dtype=weight.dtype) + delta
            g = gain(self.lora_magnitude_vector[name].weight.to(weight.dtype), adapted.flatten(1).norm(dim=1))
            merged = merged * g.view(-1, *[1] * (weight.dim() - 1))
            if "bias" in tensors:
                # As in the forward pass, the bias of the layer is not scaled, but what adapters have added to it is.
                own = self._original.get("bias", self.base_layer.bias).to(tensors["bias"])
                added = tensors["bias"] - own
                tensors["bias"] = own + g * added if added.any() else tensors["bias"]
        tensors["weight"] = merged.mT if self.kind == "Embedding" else merged
        bias = self._extra_bias(name)
        if bias is not None:
            tensors["bias"] = tensors["bias"] + bias.to(weight.dtype)

    # -- batches that mix adapters ----------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """Run the base layer with the active adapters.

        Args:
            x: The input of the base layer.
            *args: Further arguments of the base layer.
            adapter_names: The adapter of every sample of the batch, "__base__" for none; instead of the active ones.
            **kwargs: Keyword arguments of the base layer.

        Raises:
            ValueError: With `adapter_names`: their number is not the batch size, the layer is merged or in training
                mode, or one of them is a DoRA adapter.
        """
        names = self.batch_adapters if adapter_names is None else adapter_names
        if names is None or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        names = names.of(len(x)) if hasattr(names, "of") else names
        self._check_mixed(x, names)
        return self._mixed(x, names, *args, **kwargs)

    def _check_mixed(self, x: Tensor, names: Sequence[str]) -> None:
        if isinstance(names, str) or len(names) != len(x):
            raise ValueError(
                f"adapter_names: expected a list with one name for each of the {len(x)} samples, got {names!r}"
            )
        if self.training:
            raise ValueError("adapter_names: the layer is in training mode; call eval() first")
        if self.merged_adapters:
            raise ValueError("adapter_names: the layer is merged; unmerge it first")
        for name in set(names):
            if self.use_dora.get(name):
                raise ValueError(f"adapter_names: adapter {name!r} is a DoRA adapter, which cannot be mixed in a batch")

    def _mixed_groups(self, names: Sequence[str]) -> list[list[str]]:
        """Return the adapters of a batch in groups whose ranks together are small."""
        groups: list[list[str]] = []
        total = _MIXED_RANK
        for name in dict.fromkeys(names):
            if name in self.r:
                total += self.r[name]
                if total > _MIXED_RANK:
                    groups.append([])
                    total = self.r[name]
                groups[-1].append(name)
        return groups

    def _table(self, group: list[str], names: Sequence[str], rows: dict[str, Tensor | int], like: Tensor) -> Tensor:
        """Return one row for each sample: that of its adapter, or zeros.

        Args:
            group: The adapters.
            names: The adapter of every sample.
            rows: For every adapter a vector, or the size of its part of the row, which its scale fills.
            like: The dtype and device of the result.
        """
        if isinstance(next(iter(rows.values())), Tensor):
            table = torch.stack([rows[name].to(like) for name in group])
        else:
            table = like.new_zeros(len(group), sum(rows.values()))
            start = 0
            for index, name in enumerate(group):
                table[index, start : start + rows[name]] = self.scaling[name]
                start += rows[name]
        table = torch.cat([table, table.new_zeros(1, table.shape[1])])
        index = {name: i for i, name in enumerate(group)}
        return table[torch.tensor([index.get(name, len(group)) for name in names], device=like.device)]
