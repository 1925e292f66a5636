"""What LoRA's layers share: settings, DoRA's magnitudes, merging, and batches that mix adapters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...methods import dora, lora
from ...methods._base_layer import listened_to, observed, rows_of
from ...methods.lora import LowRank
from ...ops.kept import Kept
from ..base.adapter_layer import Adapter
from ..base.config import PeftConfig
from ..base.decomposed import Decomposed
from ..base.merging import Merged
from .config import LoraConfig
from .magnitude import Magnitude
from .padding import rank_of, resized
from .start import starts_inside

BASE = "__base__"


class LoRALayer(Decomposed):
    """A layer with LoRA adapters, each of them plain or DoRA; a subclass is a kind of base layer.

    ``layer(x, adapter_names=names)`` runs a batch whose samples have adapters of their own: one name for each sample,
    "__base__" for none, instead of the active ones, also with gradients for all of them. It raises ValueError if their
    number is not the batch size, if the layer is merged, or if one of them is a DoRA adapter.
    """

    magnitudes = "lora_magnitude_vector"
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", magnitudes)
    file_names = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}  # noqa: RUF012 - a ClassVar of the base
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "dora_inputs")
    config_class = LoraConfig
    update_fields = {"r": "r", "lora_alpha": "lora_alpha"}  # noqa: RUF012 - a ClassVar of the base

    @classmethod
    def _norms(cls, base_layer: Any, adapter: Adapter) -> Tensor:
        scale, of_inputs = adapter.settings["scaling"], adapter.settings["dora_inputs"]
        return dora.norms(base_layer, *cls._factors_of(adapter.parts), scale, of_inputs)

    @classmethod
    def _reads_weight(cls, config: LoraConfig, initialise: bool) -> str | None:
        return super()._reads_weight(config, initialise) or (
            "init_lora_weights" if starts_inside(config.init_lora_weights) else None
        )

    def check_add(self, config: PeftConfig, initialise: bool = True) -> None:
        """Raise ValueError if the base weight is needed and adapters are merged into it."""
        super().check_add(config, initialise)
        if starts_inside(config.init_lora_weights) and self.merged_adapters:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r}: such an adapter starts as a part of the base weight, "
                f"and {self.merged_adapters} are merged into it; unmerge first"
            )

    @classmethod
    def _settings(cls, config: LoraConfig, module_name: str) -> dict[str, Any]:
        r = config._of_module(config.rank_pattern, module_name, config.r)
        alpha = config._of_module(config.alpha_pattern, module_name, config.lora_alpha)
        return {
            "r": r,
            "lora_alpha": alpha,
            "scaling": alpha / math.sqrt(r) if config.use_rslora else alpha / r,
            "lora_dropout": float(config.lora_dropout),
            "use_dora": config.use_dora,
            "dora_inputs": config.dora_inputs,
        }

    @staticmethod
    def _warn_about_bias(base_layer: nn.Module, config: LoraConfig, module_name: str) -> None:
        if config.lora_bias and base_layer.bias is None:
            warnings.warn(
                "lora_bias: `lora_bias=True` was passed but the targeted layer of type "
                f"{type(base_layer).__name__} has no bias (module {module_name!r}), so it can never be merged",
                stacklevel=2,
            )

    # -- what a subclass says ---------------------------------------------------------------------------------

    @staticmethod
    def _factors_of(parts: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return A and B among the parts of an adapter."""
        return parts["lora_A"].weight, parts["lora_B"].weight

    def _with_mixed(
        self, x: Tensor, adapters: list[LowRank], choice: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Return the output for samples that choose among adapters, by index, or -1 for none."""
        raise NotImplementedError

    def low_rank(self, name: str) -> LowRank:
        """Return the tensors and settings of one adapter, as its arithmetic takes them."""
        a, b = self._pair(name)
        p = self.lora_dropout[name] if self.training else 0.0
        low_rank = LowRank(a, b, self.scaling[name], None, self._extra_bias(name), p)
        if not self.use_dora[name]:
            return low_rank
        kept = self._kept.setdefault(name, Kept())
        magnitude, of_inputs = self.lora_magnitude_vector[name].weight, self.dora_inputs[name]
        return low_rank._replace(magnitude=magnitude, kept=kept, of_inputs=of_inputs)

    def _listened_to(self, names: list[str]) -> bool:
        """Whether somebody would notice that the modules of these adapters are not called.

        Raises:
            NotImplementedError: One of them is a DoRA adapter, whose norms are not those of a call.
        """
        found = False
        for name in names:
            if self.use_dora[name]:
                self._check_dora_unheard(name)
            else:
                found = found or listened_to(self._factor_class, *self._factor_modules(name))
        return found

    # -- files ------------------------------------------------------------------------------------------------

    def factors(self, name: str) -> list[tuple[str, nn.Module | nn.Parameter]]:
        """Return the file key, after the path of the layer, and the holder of A and of B of an adapter."""
        held = self.adapter_layer_names[:2]
        return [(c if c in self.parameter_names else f"{c}.weight", getattr(self, c)[name]) for c in held]

    def as_in_file(self, name: str, config: Any, path: str, tensors: dict[str, Tensor], prefix: str) -> None:
        """Give the factors the rank that the configuration says; in memory there may be zeros beside it.

        Raises:
            ValueError: There is something else beside it.
        """
        before, after = self.r[name], self._settings(config, path)["r"]
        given = dict(tensors)
        self._resize(name, before, after, tensors, prefix)
        if after < before and self._loses(name, before, given, tensors, prefix):
            raise ValueError(
                f"r: adapter {name!r} has rank {before} on module {path!r} and its configuration says {after}; set the "
                "fields of the configuration to what was trained"
            )

    def _loses(self, name: str, before: int, given: dict[str, Tensor], cut: dict[str, Tensor], prefix: str) -> bool:
        """Whether an update is more than what its factors have left after they were cut to a rank."""
        lost = []
        for which, (key, _) in enumerate(self.factors(name)):
            whole, rest = given.get(prefix + key), cut.get(prefix + key)
            if whole is None or rest is None or whole.is_meta:
                return False
            lost.append(bool((whole != resized(rest, which, self.groups, before)).any()))
        return all(lost)

    def as_in_memory(self, name: str, config: Any, path: str, tensors: dict[str, Tensor], prefix: str) -> None:
        """Put zeros beside factors of a smaller rank; those of a larger one stay as they are."""
        rank = self._settings(config, path)["r"]
        if rank < self.r[name]:
            self._resize(name, rank, self.r[name], tensors, prefix)

    def _resize(self, name: str, before: int, after: int, tensors: dict[str, Tensor], prefix: str) -> None:
        for which, (key, _) in enumerate(self.factors(name)):
            factor = tensors.get(prefix + key)
            # What a caller gives may have another rank, and is refused as it is.
            if factor is not None and factor.dim() > 1 and rank_of(factor, which, self.groups) == before:
                tensors[prefix + key] = resized(factor, which, self.groups, after)

    @property
    def groups(self) -> int:
        """The groups of the base layer, which a convolution has."""
        return getattr(self.base_layer, "groups", 1)

    @property
    def _factor_class(self) -> type[nn.Module]:
        # GPT-2's Conv1D has linear factors, and torch's Conv1d convolutions.
        return getattr(nn, str(self.kind)) if self.kind in ("Conv1d", "Conv2d", "Conv3d") else nn.Linear

    def _factor_modules(self, name: str) -> tuple[nn.Module, ...]:
        """The modules that hold the factors of an adapter; those of an embedding are parameters."""
        return () if self.kind == "Embedding" else (self.lora_A._modules[name], self.lora_B._modules[name])

    def _check_dora_unheard(self, name: str) -> None:
        factors = observed(self._factor_class, *self._factor_modules(name))
        if factors or observed(Magnitude, self.lora_magnitude_vector[name]):
            where = f"module {self.module_name!r}: " if self.module_name else ""
            raise NotImplementedError(
                f"{where}a hook, a wrapper or another forward is on a module of DoRA adapter {name!r} (lora_A, lora_B, "
                "lora_magnitude_vector), which computes with their weights and calls none; remove it, or use LoRA"
            )

    def _check_unheard(self, names: list[str], instead: str) -> None:
        """Raise NotImplementedError if somebody listens to modules of these adapters, which are not called here."""
        if observed(self._factor_class, *(module for name in names for module in self._factor_modules(name))):
            raise NotImplementedError(
                f"module {self.module_name!r}: a hook, a wrapper or another forward is on lora_A or lora_B of "
                f"{' or '.join(repr(name) for name in names)}, whose modules {instead} does not call; remove it"
            )

    def _called(self, x: Tensor, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the output with every adapter's modules called, as somebody listens to them."""
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            p = self.lora_dropout[name] if self.training else 0.0
            result = lora.add_called(result, x, self.lora_A[name], self.lora_B[name], self.scaling[name], p)
        return result

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        containers = (self.adapter_layer_names[0], self.adapter_layer_names[1])
        return self._factors_of({c: getattr(self, c)[name] for c in containers})

    # -- merging ----------------------------------------------------------------------------------------------

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

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update of one adapter, (out, in) or as a convolution's weight, without DoRA's scaling."""
        return lora.update(self.low_rank(adapter))

    def _merge_into(self, tensors: Merged, name: str) -> None:
        weight, bias = tensors["weight"], tensors.get("bias")
        own = rows_of(self.base_layer, self._original.get("weight", self.base_layer.weight))
        own_bias = self._original.get("bias", getattr(self.base_layer, "bias", None))
        rows = weight.mT if self.kind == "Embedding" else weight
        merged, bias = lora.merged(rows, bias, self.low_rank(name), own, own_bias)
        tensors["weight"] = merged.mT if self.kind == "Embedding" else merged
        if bias is not None:
            tensors["bias"] = bias

    # -- batches that mix adapters ----------------------------------------------------------------------------

    def _mixed(self, x: Tensor, names: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        names = names.of(len(x)) if hasattr(names, "of") else names
        self._check_mixed(x, names)
        found = [name for name in dict.fromkeys(names) if name in self.r]
        index = {name: i for i, name in enumerate(found)}
        choice = [index.get(name, -1) for name in names]

        def mix(x: Tensor, found: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            self._check_unheard(found, "a batch that mixes adapters")
            return self._with_mixed(x, [self.low_rank(name) for name in found], choice, args, kwargs)

        if "forward" in self._modules["base_layer"].__dict__:
            return self._onloaded(mix, x, found, args, kwargs)
        return mix(x, found, args, kwargs)

    def _check_mixed(self, x: Tensor, names: Sequence[str]) -> None:
        if isinstance(names, str) or len(names) != len(x):
            raise ValueError(
                "adapter_names: expected a list with one name for each sample. Length of `adapter_names` should be the "
                f"same as the number of inputs, but got {len(names)} and {len(x)}"
            )
        if self.merged_adapters:
            raise ValueError(
                "adapter_names: Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        for name in set(names):
            if self.use_dora.get(name):
                raise ValueError(
                    f"adapter_names: Cannot pass `adapter_names` when DoRA is enabled. Adapter {name!r} has it"
                )
