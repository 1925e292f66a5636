"""What is computed from an adapter's parameters alone, kept between calls that record nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from ..runtime import registry
from .plain import unobserved

Value = TypeVar("Value")


class _Entry(NamedTuple):
    copies: tuple[Tensor, ...]
    value: Any


class Kept:
    """A value, with copies of the parameters that it was made of.

    Every call compares the parameters with the copies, bit by bit: some microseconds, and no write is overlooked,
    also none through ``.data``, which torch does not count. It is neither copied nor pickled.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], Value]) -> Value:
        """Return what `make` returns, or what it returned before for the same `sources`.

        Args:
            sources: The tensors that the value depends on; nothing else may change it. Small ones: all are compared.
            make: Makes the value.
        """
        if not unobserved() or not all(t.is_cpu and t.is_contiguous() for t in sources):
            self._entry = None
            return make()
        module = registry.backend_module("native", "same_bits")
        if isinstance(module, str):
            return make()
        # Read once: another thread may run the same layer.
        entry = self._entry
        if entry is not None and len(entry.copies) == len(sources):
            for source, copied in zip(sources, entry.copies, strict=True):
                if source.dtype is not copied.dtype or source.shape != copied.shape:
                    break
                if not module.same_bits(source, copied):
                    break
            else:
                found: Value = entry.value
                return found
        copies = tuple(source.detach().clone() for source in sources)
        value = make()
        self._entry = _Entry(copies, value)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()
