"""The strength of adapters: the methods by which diffusers and scripts set it on the layers of Hugging Face PEFT."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...ops.kept import Kept

_ATTENTION_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


class Scalable(nn.Module):
    """The part of `AdapterLayer` that sets strengths.

    A method whose update has a scale of its own keeps it in `scaling`, as in PEFT, and strengths multiply that. The
    output of any other is the line through that of strength 0, the layer without the adapter, and that of 1; PEFT
    refuses or ignores them there.
    """

    # PEFT's layers cast their input to the dtype of the adapter unless this is False, which diffusers sets. Here the
    # input keeps its dtype, and nothing reads this.
    cast_input_dtype_enabled = True
    base_layer: Any
    active_adapters: list[str]
    merged_adapters: list[str]
    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        @property
        def adapter_names(self) -> list[str]:
            """The names of all adapters on this layer."""

        def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor: ...

    def _start_scaling(self) -> None:
        # What `scaling` was when an adapter came, and strengths other than 1 of methods that have no `scaling`.
        self._first_scaling: dict[str, float] = {}
        self._strengths: dict[str, float] = {}
        self._kept: dict[str, Kept] = {}
        register_with_peft()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter: 1 is that of its configuration, 0 switches it off.

        Of a DoRA adapter it is the strength of the low-rank update; the magnitudes stay at 0, as in PEFT.

        A name that this layer does not have is ignored, as in PEFT.

        Raises:
            TypeError: `scale` is not a number.
            ValueError: It is not finite.
        """
        _check_scale(scale)
        if adapter not in self.adapter_names:
            return
        self._tell_merged([adapter])
        if adapter in self._first_scaling:
            self.write_scaling(adapter, scale * self._first_scaling[adapter])
        else:
            self._set_strength(adapter, float(scale))

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of every active adapter.

        Raises:
            TypeError: `scale` is not a number.
            ValueError: It is not finite.
        """
        _check_scale(scale)
        if scale != 1:
            self._multiply(lambda value: value * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of every active adapter, or, with None, set it back to 1.

        Raises:
            TypeError: `scale` is not a number.
            ValueError: It is not finite, or it is 0, by which nothing can be divided; `set_scale` sets strengths back.
        """
        if scale is None:
            for name in self.active_adapters:
                self.set_scale(name, 1.0)
            return
        _check_scale(scale)
        if scale == 0:
            raise ValueError("scale: expected a number other than 0; unscale_layer() sets every strength back to 1")
        if scale != 1:
            self._multiply(lambda value: value / scale)

    def _multiply(self, change: Any) -> None:
        names = [name for name in dict.fromkeys(self.active_adapters) if name in self.adapter_names]
        self._tell_merged(names)
        for name in names:
            if name in self._first_scaling:
                self.write_scaling(name, float(change(self.scaling[name])))
            else:
                self._set_strength(name, change(self._strengths.get(name, 1.0)))

    def write_scaling(self, name: str, value: float) -> None:
        """Set the scale of an adapter; one that is a tensor stays that tensor, so that compiled code sees it."""
        held = self.scaling[name]
        if isinstance(held, Tensor):
            held.fill_(value)
        else:
            self.scaling[name] = value

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Scales that are tensors go where the layer goes; they keep their dtype.
        result = super()._apply(fn, recurse)
        for name, value in getattr(self, "scaling", {}).items():
            if isinstance(value, Tensor):
                device = fn(torch.empty(0, device=value.device)).device
                self.scaling[name] = value if device.type == "meta" else value.to(device)
        return result

    def _set_strength(self, name: str, value: float) -> None:
        if value == 1:
            self._strengths.pop(name, None)
        else:
            self._strengths[name] = value

    def _tell_merged(self, names: list[str]) -> None:
        if any(name in self.merged_adapters for name in names):
            warnings.warn(
                "set_scale, scale_layer, unscale_layer: adapters are merged into the weight, whose strength is that of "
                "the merge; another one acts once they are unmerged and merged again",
                stacklevel=4,
            )

    def _at_strength(self, x: Tensor, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the output with the adapters `names`, some of which have a strength other than 1."""
        strengths = {name: self._strengths.get(name, 1.0) for name in names}
        chosen = [name for name in names if strengths[name] != 0]
        partial = [(name, strengths[name]) for name in chosen if strengths[name] != 1]
        return self._between(x, chosen, partial, args, kwargs)

    def _between(
        self,
        x: Tensor,
        names: list[str],
        partial: list[tuple[str, float]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if not partial:
            return self._adapted(x, names, *args, **kwargs)
        # Linear in every strength, whether updates are added or follow each other.
        (name, strength), *rest = partial
        without = self._between(x, [other for other in names if other != name], rest, args, kwargs)
        return torch.lerp(without, self._between(x, names, rest, args, kwargs).to(without.dtype), strength)

    def _merge_at_strength(self, tensors: dict[str, Tensor], name: str) -> None:
        """Merge one adapter into `tensors`, as far as its strength says."""
        strength = self._strengths.get(name, 1.0)
        if strength == 0:
            return
        before = dict(tensors)
        self._merge_into(tensors, name)
        if strength != 1:
            for key, merged in tensors.items():
                if merged is not before[key]:
                    tensors[key] = torch.lerp(before[key], merged, strength)


def _check_scale(scale: object) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number, got {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")


def register_with_peft() -> bool:
    """Let `isinstance(layer, BaseTunerLayer)` hold for adapted layers, if Hugging Face PEFT has been imported.

    diffusers asks that before it sets a strength. BaseTunerLayer is an abstract base class, which takes classes that
    do not inherit from it; nothing is imported here.

    Returns:
        Whether it holds.
    """
    base = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if base is None or not hasattr(base, "register"):
        return False
    if not issubclass(Scalable, base):
        base.register(Scalable)
    return True


def note_attention_scale(arguments: Mapping[str, Any]) -> None:
    """Make sure that a strength in the arguments of a diffusers model reaches the layers, or warn that it does not."""
    if register_with_peft():
        return
    for name in _ATTENTION_ARGUMENTS:
        value = arguments.get(name)
        if isinstance(value, Mapping) and value.get("scale", 1) != 1:
            warnings.warn(
                f"{name}: scale={value['scale']!r} reaches adapters only if Hugging Face PEFT has been imported, by "
                "which diffusers finds them; import peft first, or call set_scale or scale_layer of the layers",
                stacklevel=4,
            )


__all__ = ["Scalable", "note_attention_scale", "register_with_peft"]
