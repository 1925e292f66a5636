"""Writing adapters into the weight of a frozen layer, and taking them out again, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...methods._base_layer import foreign_forward, opaque_weight
from .kinds import HALF, KINDS
from .offloading import TAKE_OFF
from .undo import all_or_nothing
from .walking import all_modules, all_parameters


class Merged(dict[str, Tensor]):
    """Tensors that a merge makes, by name, with what is wrong with them although they are finite.

    Attributes:
        faults: Why `safe_merge` refuses them.
        warnings: Calls that warn of what an ordinary merge is about to write.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.faults: list[str] = []
        self.warnings: list[Callable[[], None]] = []


class Mergeable(nn.Module):
    """The half of `AdapterLayer` that merges; a method says in `_merge_into` what the merged weight is."""

    adapter_layer_names: ClassVar[tuple[str, ...]]
    # Any class of layer, whose attributes differ.
    base_layer: Any
    kind: str | None
    in_features: int
    out_features: int
    active_adapters: list[str]
    merged_adapters: list[str]
    if TYPE_CHECKING:
        # Containers are dictionaries of modules or of parameters, which the checker cannot tell apart.
        def __getattr__(self, name: str) -> Any: ...
        @property
        def adapter_names(self) -> list[str]:
            """The names of all adapters on this layer."""

        @property
        def bias(self) -> Tensor | None:
            """The bias of the base layer, if it has one."""

    _original: dict[str, Tensor]
    _versions: dict[str, int]

    def _merge_into(self, tensors: Merged, name: str) -> None:
        """Replace `weight` (and `bias`) in `tensors` by what they are once `name` is merged."""
        raise NotImplementedError

    # What adapters are merged into, by its name in the module that holds it.
    weight_name: str = "weight"

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer that adapters change."""
        weight: Tensor = getattr(self._holder, self.weight_name)
        return weight

    @property
    def _holder(self) -> Any:
        """The module that holds the weight."""
        return self.base_layer

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    def _to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names: expected a list of adapter names, got {adapter_names!r}")
        names = self.active_adapters if adapter_names is None else adapter_names
        attached = self.adapter_names
        return [name for name in dict.fromkeys(names) if name in attached and name not in self.merged_adapters]

    def _merge_order(self, names: list[str]) -> list[str]:
        """Return the adapters in the order in which they are multiplied onto the weight."""
        # The adapter that acts first on the input is the last factor next to the weight.
        return names[::-1]

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if one of these adapters can never be merged into this layer, as into a quantised one."""
        if not self._to_merge(adapter_names):
            return
        opaque = opaque_weight(self.base_layer)
        if opaque is not None:
            raise ValueError(
                f"merge: the weight of this {type(self.base_layer).__name__} is {opaque}, and merging would round the "
                "adapter to what that can hold; unload() the adapter, or load it on the model in full precision and "
                "merge it there"
            )
        if self.weight.is_meta:
            raise ValueError(
                "merge: the base weight is on the meta device, offloaded or not loaded yet, where nothing can be "
                "written; load the model without offloading to merge, or keep the adapter unmerged"
            )
        containers = (self._modules[name] for name in self.adapter_layer_names)
        if any(p.is_meta for p in all_parameters(all_modules(*containers))):
            away = next(name for name, p in self.named_parameters() if p.is_meta)
            raise ValueError(f"merge: {away} is on the meta device, offloaded; {TAKE_OFF} before merging")
        foreign = foreign_forward(self.base_layer)
        if foreign is not None and self.kind is not None:
            raise ValueError(
                f"merge: this layer has the forward of {foreign}, which may compute something else from its weight "
                f"than that of {KINDS[self.kind]}; unload() the adapter, or keep it unmerged, where it acts on the "
                "output of the call"
            )
        self._check_own(self.weight_name)

    def _check_own(self, key: str) -> None:
        if key not in self._holder._parameters:
            raise ValueError(
                f"merge: the base {key} is computed from other parameters; remove its parametrization first"
            )

    @torch.no_grad()
    def merged_tensors(self, adapter_names: Sequence[str] | None = None) -> Merged:
        """Compute what the base weight (and bias) become, without changing anything.

        All adapters are applied to the original weight in float32 (float64 for a float32 weight), and the result is
        rounded once to the dtype of the weight.
        """
        self.check_merge(adapter_names)
        self.check_written()
        return self._merged_tensors(self._to_merge(adapter_names))

    def _merged_tensors(self, names: list[str]) -> Merged:
        names = [*self.merged_adapters, *names]
        weight = self.weight
        base: dict[str, Any] = {self.weight_name: weight, "bias": self.bias}
        if weight.numel() == 0 and self.in_features * self.out_features:
            raise ValueError("merge: the base weight is an empty shard; gather it first")
        wide = torch.float32 if weight.dtype in HALF or weight.device.type == "mps" else torch.float64
        source = {
            key: self._original.get(key, tensor).to(device=weight.device, dtype=wide)
            for key, tensor in base.items()
            if tensor is not None
        }
        if self.kind == "Conv1D":
            source["weight"] = source["weight"].mT
        tensors = Merged(source)
        for name in self._merge_order(names):
            self._merge_at_strength(tensors, name)
        changed = {key: tensor for key, tensor in tensors.items() if tensor is not source[key]}
        for key in changed:
            self._check_own(key)
        if self.kind == "Conv1D" and "weight" in changed:
            changed["weight"] = changed["weight"].mT
        result = Merged({key: torch.empty_like(base[key]).copy_(tensor) for key, tensor in changed.items()})
        result.faults, result.warnings = tensors.faults, tensors.warnings
        return result

    @torch.no_grad()
    def merge(
        self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None, *, keep_base: str = "device"
    ) -> None:
        """Write the active (or the named) adapters into the base weight.

        The original tensors are kept, which is the only exact way back in low precision; it costs one copy of the
        weight.

        Args:
            safe_merge: Check, before anything is changed, that the result is finite and that no rotation is far from
                orthogonal, as OFT's series is outside its radius. Without it, the latter is a warning.
            adapter_names: Which adapters, in the order in which they act; None means the active ones.
            keep_base: Where the original is kept: `"device"` (where it is) or `"cpu"`.

        Raises:
            ValueError: With `safe_merge`, the merged weight would not be finite, or a rotation is far from orthogonal;
                or `keep_base` is unknown.
        """
        check_keep_base(keep_base)
        if not self._to_merge(adapter_names):
            return
        self.check_merge(adapter_names)
        self.check_written()
        with all_or_nothing([self], all_parameters([self.base_layer])):
            self.merge_checked(safe_merge, adapter_names, keep_base=keep_base)

    @torch.no_grad()
    def merge_checked(
        self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None, *, keep_base: str = "device"
    ) -> None:
        """As `merge`, for a caller who has called `check_merge` and `check_written`, and undoes what fails."""
        names = self._to_merge(adapter_names)
        if not names:
            return
        tensors = self._merged_tensors(names)
        if safe_merge:
            check_finite(tensors, names)
        for tell in tensors.warnings:
            tell()
        for key, tensor in tensors.items():
            parameter = getattr(self._holder, key)
            if key not in self._original:
                self._original[key] = parameter.detach().to("cpu") if keep_base == "cpu" else parameter.detach()
            _replace(parameter, tensor)
            if not parameter.is_inference():
                self._versions[key] = parameter._version
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original tensors back, bit for bit.

        Raises:
            ValueError: A merged tensor was written to since.
        """
        if not self.merged_adapters:
            warnings.warn("unmerge: nothing is merged", stacklevel=2)
            return
        self.check_written()
        with all_or_nothing([self], [getattr(self._holder, key) for key in self._original]):
            self.unmerge_checked()

    @torch.no_grad()
    def unmerge_checked(self) -> None:
        """As `unmerge`, for a caller who has called `check_written`, and undoes what fails."""
        for key, tensor in self._original.items():
            parameter = getattr(self._holder, key)
            _replace(parameter, tensor.to(device=parameter.device, dtype=parameter.dtype))
        self._original, self._versions = {}, {}
        self.merged_adapters = []

    def check_written(self) -> None:
        """Raise ValueError if a merged tensor was written to, by an optimizer say: unmerging it would lose that."""
        if not self.merged_adapters:
            return
        for key, version in self._versions.items():
            parameter = getattr(self._holder, key)
            if not parameter.is_inference() and parameter._version > version:
                raise ValueError(
                    f"base_layer: its {key} was written to while {self.merged_adapters} were merged into it, and "
                    "unmerging, or merging more, would lose that; merge_and_unload() keeps it"
                )

    # -- loading into a merged layer --------------------------------------------------------------------------

    def check_load(self, keys: Iterable[str], prefix: str) -> None:
        """Raise ValueError if loading these keys of a state dict would be undone, or ignored, by what is merged.

        The keys of this layer begin with `prefix`. A merged weight stands for the original one and the adapters, so
        nothing says which of the two a loaded one means; and merged adapters are not looked at again.
        """
        if not self.merged_adapters:
            return
        held = [f"{prefix}base_layer.{key}" for key in self._original]
        held += [f"{prefix}{part}.{name}" for part in self.adapter_layer_names for name in self.merged_adapters]
        for key in keys:
            if any(key == one or key.startswith(f"{one}.") for one in held):
                where = repr(prefix[:-1]) if prefix else "this layer"
                raise ValueError(
                    f"state_dict: {key!r} cannot be loaded while {self.merged_adapters} are merged into {where}: "
                    "unmerging would put the weight of before the load back; unmerge first"
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Called before the modules inside are loaded.
        self.check_load(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def check_keep_base(keep_base: object) -> None:
    """Raise ValueError unless `keep_base` says where the original tensors can be kept."""
    if keep_base not in ("device", "cpu"):
        raise ValueError(f"keep_base: expected 'device' or 'cpu', got {keep_base!r}")


def _replace(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Put other values into a parameter, so that differentiating an earlier pass raises instead of using them."""
    parameter.data = tensor
    torch.autograd.graph.increment_version(parameter)


def check_finite(tensors: dict[str, Tensor], names: Sequence[str], where: str = "") -> None:
    """Raise ValueError if a merged tensor holds NaN or infinity, or is finite and wrong nevertheless."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"safe_merge: merging {list(names)} would make the {key} {where}non-finite; nothing was merged"
            )
    for fault in tensors.faults if isinstance(tensors, Merged) else ():
        raise ValueError(f"safe_merge: merging {list(names)} {where}{fault}; nothing was merged")
