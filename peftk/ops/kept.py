"""What is computed from an adapter's parameters alone, kept between calls that record nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..runtime import registry
from .plain import unobserved

Value = TypeVar("Value")


class _Entry(NamedTuple):
    kept: tuple[Tensor, ...]
    layouts: list[tuple[torch.dtype, torch.Size]]
    settings: Any
    value: Any


def _layouts(sources: Sequence[Tensor]) -> list[tuple[torch.dtype, torch.Size]]:
    return [(source.dtype, source.shape) for source in sources]


def keeps(sources: Sequence[Tensor]) -> bool:
    """Whether what is made of these tensors is kept: nothing records or transforms it, and their bits can be read."""
    return unobserved() and all(t.is_cpu and t.is_contiguous() for t in sources)


def rows_in_memory(weight: Tensor) -> Tensor | None:
    """Return a view of a weight whose rows lie one behind the other, or None if it has no checksums.

    To be asked where `keeps` says that something is kept.

    Args:
        weight: Of any shape. It has checksums on the CPU, in float32 or bfloat16, and contiguous, or the transpose of
            what is, or a convolution's with the channels last.
    """
    module = registry.backend_module("native", "few_rows")
    if isinstance(module, str) or not weight.is_cpu or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if weight.dim() > 1 and not weight.is_contiguous():
        weight = weight.mT if weight.dim() == 2 else weight.movedim(1, -1)
    return weight if weight.dim() > 1 and weight.is_contiguous() else None


def weight_sums(rows: Tensor) -> Tensor:
    """Return the checksums of a weight that is too large to be copied, of `rows_in_memory`, for `same_weight`.

    A write to one number is always found; one to many is overlooked in one case of four thousand million.
    """
    module = registry.backend_module("native", "few_rows")
    assert not isinstance(module, str)
    sums: Tensor = module.row_sums(rows)
    return sums


def same_weight(rows: Tensor, sums: Tensor) -> bool:
    """Whether a weight is the one that had these checksums."""
    module = registry.backend_module("native", "few_rows")
    assert not isinstance(module, str)
    return rows.shape[0] == sums.shape[0] and bool(module.same_row_sums(rows, sums))


class Kept:
    """A value, with copies or checksums of the parameters that it was made of.

    Every call compares the parameters with these: some microseconds, and no write is overlooked, also none through
    ``.data``, which torch does not count. It is neither copied nor pickled.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], Value], settings: Any = None) -> Value:
        """Return what `make` returns, or what it returned before for the same `sources` and `settings`.

        Args:
            sources: The tensors that the value depends on. Small ones: all are read in every call.
            make: Makes the value.
            settings: What else the value depends on, compared by ``==``; nothing but this and the sources may change
                it, or the caller finds out and has it forgotten.
        """
        if not keeps(sources):
            self._entry = None
            return make()
        module = registry.backend_module("native", "same_bits")
        if isinstance(module, str):
            return make()
        # Read once: another thread may run the same layer.
        entry = self._entry
        if (
            entry is not None
            and entry.settings == settings
            and entry.layouts == _layouts(sources)
            and all(map(module.same_bits, sources, entry.kept))
        ):
            found: Value = entry.value
            return found
        kept = tuple(map(module.kept_bits, sources))
        value = make()
        self._entry = _Entry(kept, _layouts(sources), settings, value)
        return value

    def held(self, settings: Any) -> tuple[tuple[Tensor, ...], Any] | None:
        """Return what tells whether the sources have changed, and the value; or None if it has other settings."""
        entry = self._entry
        return None if entry is None or entry.settings != settings else (entry.kept, entry.value)

    def forget(self) -> None:
        """Have the value made anew at the next call."""
        self._entry = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()
