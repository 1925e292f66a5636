"""Triton's interpreter made fit for proofs: bfloat16 and tf32 as a GPU rounds them, and every access to memory checked.

Import this in a process that was started with ``TRITON_INTERPRET=1``; anywhere else it does nothing. Then

- bfloat16, which the interpreter keeps as raw 16-bit integers, is computed with: casts round to nearest even,
  arithmetic is done in float32 and rounded, products accumulate in float32;
- a product of float32 tiles that does not ask for ``input_precision="ieee"`` rounds its operands to tf32, as a GPU
  does;
- every launch runs under a guard (`Guard`): an access outside the launch's tensors, a race between two programs, or a
  store whose lanes disagree about one address stops it with an `IndexError` or a `RaceError`.

The interpreter is patched where Triton 3.6 to 3.9 have the same seams; ``tests/test_triton_interpreter.py`` plants the
errors that this module must find.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from ..triton_kernels import _launch

MARGIN = 1 << 16
"""Bytes before and behind every tensor that belong to no argument, so that an overrun hits nothing by chance."""

_NOBODY, _SEVERAL, _ATOMIC = -1, -2, -3


class RaceError(RuntimeError):
    """Two programs of one launch touch an address in an order that a GPU does not promise."""


@dataclasses.dataclass
class _Storage:
    """A copy of one argument's storage with margins, and who touched each address of it in this launch."""

    copy: Tensor
    start: int
    original: torch.UntypedStorage
    writers: np.ndarray | None = None
    readers: np.ndarray | None = None

    @property
    def low(self) -> int:
        return self.copy.data_ptr() + self.start

    def touched(self) -> tuple[np.ndarray, np.ndarray]:
        if self.writers is None or self.readers is None:
            self.writers = np.full(self.original.nbytes(), _NOBODY, np.int32)
            self.readers = self.writers.copy()
        return self.writers, self.readers


class Guard:
    """The memory that one launch may use.

    Every storage among the arguments is copied to a place of its own with `MARGIN` unused bytes on both sides, the
    kernel runs on the copies, and what it wrote is copied back. A lane that is not masked off must lie inside the
    elements of one argument (from the first to the last that its strides reach). Within the launch no program may
    store where another one reads or stores; atomics may meet each other.

    Attributes:
        fault: the first error found.
    """

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.fault: Exception | None = None
        self._storages: dict[int, _Storage] = {}
        self._extents: dict[str, tuple[int, int, _Storage]] = {}

    def adopt(self, name: str, argument: Any) -> Any:
        """Return an argument with its tensors moved into guarded memory."""
        if isinstance(argument, TensorDescriptor):
            return dataclasses.replace(argument, base=self.adopt(name, argument.base))
        if not isinstance(argument, Tensor):
            return argument
        storage = self._moved(argument.untyped_storage())
        size = argument.element_size()
        offset = storage.start // size + argument.storage_offset()
        moved = torch.empty(0, dtype=argument.dtype)
        moved.set_(storage.copy.untyped_storage(), offset, argument.size(), argument.stride())
        reach = sum((n - 1) * s for n, s in zip(argument.shape, argument.stride(), strict=True)) + 1
        low = moved.data_ptr()
        self._extents[name] = low, low + (reach * size if argument.numel() else 0), storage
        return moved

    def _moved(self, original: torch.UntypedStorage) -> _Storage:
        key = original.data_ptr()
        if key not in self._storages:
            copy = torch.empty(original.nbytes() + 2 * MARGIN + 256, dtype=torch.uint8)
            # The same address modulo 256: what is aligned stays so, and what is not does not become it.
            start = MARGIN + (key - copy.data_ptr() - MARGIN) % 256
            copy[start : start + original.nbytes()] = _bytes(original)
            self._storages[key] = _Storage(copy, start, original)
        return self._storages[key]

    def restore(self) -> None:
        """Copy what the launch wrote back to where its arguments were."""
        for storage in self._storages.values():
            size = storage.original.nbytes()
            _bytes(storage.original).copy_(storage.copy[storage.start : storage.start + size])

    def check(self, kind: str, pointers: TensorHandle, mask: Any, value: TensorHandle | None = None) -> None:
        """Check one access of the running program: kind is "load", "store" or "atomic"."""
        enabled = np.broadcast_to(np.asarray(getattr(mask, "data", mask), dtype=bool), pointers.data.shape)
        addresses = pointers.data[enabled].astype(np.int64)
        if not addresses.size:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        left = np.ones(addresses.shape, bool)
        for low, high, storage in self._extents.values():
            inside = left & (addresses >= low) & (addresses + width <= high)
            if inside.any():
                self._race(kind, addresses[inside] - storage.low, storage)
                left &= ~inside
        if left.any():
            self._outside(kind, addresses[left], width, addresses.size)
        if kind == "store" and value is not None:
            stored = np.broadcast_to(value.data, pointers.data.shape)[enabled]
            self._agree(addresses, stored)

    def _fail(self, error: Exception) -> None:
        self.fault = self.fault or error
        raise error

    def _where(self) -> str:
        return f"{self.kernel}, program {tuple(interpreter.interpreter_builder.grid_idx)}"

    def _outside(self, kind: str, addresses: np.ndarray, width: int, lanes: int) -> None:
        first = int(addresses[0])
        nearest = min(self._extents, key=lambda n: max(self._extents[n][0] - first, first - self._extents[n][1]))
        low, high, _ = self._extents[nearest]
        place = f"{low - first} bytes before" if first < low else f"{first - high} bytes behind the end of"
        article = "an" if kind == "atomic" else "a"
        extents = ", ".join(f"{name} {high - low} bytes" for name, (low, high, _) in self._extents.items())
        self._fail(
            IndexError(
                f"{self._where()}: {len(addresses)} of {lanes} lanes of {article} {kind} of {width} bytes lie outside "
                f"every argument; the first starts {place} {nearest} (arguments: {extents})"
            )
        )

    def _race(self, kind: str, offsets: np.ndarray, storage: _Storage) -> None:
        (x, y, z), (nx, ny, _) = interpreter.interpreter_builder.grid_idx, interpreter.interpreter_builder.grid_dim
        program = x + nx * (y + ny * z)
        writers, readers = storage.touched()
        wrote, read = writers[offsets], readers[offsets]
        foreign = (wrote != _NOBODY) & (wrote != program)
        if kind == "atomic":
            foreign &= wrote != _ATOMIC
        if kind != "load":
            foreign |= (read != _NOBODY) & (read != program)
        if foreign.any():
            index = int(np.argmax(foreign))
            name = next(n for n, (low, high, s) in self._extents.items() if s is storage and low < high)
            done = "store to" if wrote[index] not in (_NOBODY, program) else "load from"
            self._fail(
                RaceError(
                    f"{self._where()}: the {kind} of {int(foreign.sum())} lanes races with another program's {done} "
                    f"the same address; the first is byte {int(offsets[index])} of the storage of {name}"
                )
            )
        if kind == "load":
            readers[offsets] = np.where((read == _NOBODY) | (read == program), program, _SEVERAL)
        else:
            writers[offsets] = _ATOMIC if kind == "atomic" else program

    def _agree(self, addresses: np.ndarray, stored: np.ndarray) -> None:
        unique, first, inverse = np.unique(addresses, return_index=True, return_inverse=True)
        if len(unique) == len(addresses):
            return
        bits = np.ascontiguousarray(stored).view(f"u{stored.itemsize}")
        if (bits != bits[first][inverse.reshape(-1)]).any():
            self._fail(RaceError(f"{self._where()}: lanes of one store write different values to one address"))


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


_guard: Guard | None = None


@contextlib.contextmanager
def _guarded(guard: Guard) -> Iterator[None]:
    global _guard
    before, _guard = _guard, guard
    try:
        yield
    except Exception:
        # The interpreter wraps whatever a kernel raises.
        if guard.fault is not None:
            raise guard.fault from None
        raise
    finally:
        _guard = before


def _guard_launches() -> None:
    run = InterpretedFunction.run

    def guarded_run(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup:
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        guard = Guard(self.fn.__name__)
        args = tuple(guard.adopt(name, arg) for name, arg in zip(self.arg_names, args, strict=False))
        kwargs = {name: guard.adopt(name, arg) for name, arg in kwargs.items()}
        with _guarded(guard):
            result = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        guard.restore()
        return result

    InterpretedFunction.run = guarded_run

    def guard_access(name: str, kind: str, pointers: int, mask: int | None, value: int | None = None) -> None:
        original = getattr(InterpreterBuilder, name)

        def checked(self: InterpreterBuilder, *args: Any, **kwargs: Any) -> Any:
            if _guard is not None:
                _guard.check(
                    kind,
                    args[pointers],
                    True if mask is None else args[mask],
                    None if value is None else args[value],
                )
            return original(self, *args, **kwargs)

        setattr(InterpreterBuilder, name, checked)

    # Plain loads and stores, block pointers and tensor descriptors all end in the masked ones.
    guard_access("create_masked_load", "load", 0, 1)
    guard_access("create_masked_store", "store", 0, 2, 1)
    guard_access("create_atomic_rmw", "atomic", 1, 3)
    guard_access("create_atomic_cas", "atomic", 0, None)


def widen(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 numbers given as 16-bit integers."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Round to bfloat16, to nearest even, and return the 16-bit integers."""
    values = np.asarray(values, np.float32)
    bits: np.ndarray[Any, Any] = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _to_tf32(values: np.ndarray) -> np.ndarray:
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _repack(result: np.ndarray) -> TensorHandle:
    if result.dtype == np.bool_:
        return TensorHandle(result, tl.int1)
    return TensorHandle(narrow(result), tl.bfloat16)


def _repair_arithmetic() -> None:
    builder = InterpreterBuilder

    def in_float32(original: Callable[..., Any], operands: int) -> Callable[..., Any]:
        def repaired(self: InterpreterBuilder, *args: Any) -> TensorHandle:
            if any(_is_bf16(a) for a in args[:operands]):
                return _repack(original(self, *map(_wide, args[:operands]), *args[operands:]).data)
            result = original(self, *args)
            # A comparison's handle would keep the dtype of its operands, and its splat would be made of that.
            return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

        return repaired

    for name, operands in (("unary_op", 1), ("binary_op", 2), ("ternary_op", 3), ("create_fma", 3)):
        setattr(builder, name, in_float32(getattr(builder, name), operands))

    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def repaired_cast(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return TensorHandle(narrow(source.data), tl.bfloat16)
        return cast(self, _wide(source), target)

    def repaired_convert(self: InterpreterBuilder, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        halves = (tl.bfloat16, tl.float16)
        if target.scalar in halves and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return repaired_cast(self, source, target)
        return convert(self, source, target, rounding)

    def repaired_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, sum_: TensorHandle, precision: Any, *rest: Any
    ) -> TensorHandle:
        if not a.dtype.is_floating() or a.dtype.primitive_bitwidth not in (16, 32):
            return dot(self, a, b, sum_, precision, *rest)
        tf32 = a.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32
        operands = [_wide(t).data.astype(np.float32) for t in (a, b)]
        if tf32:
            operands = [_to_tf32(t) for t in operands]
        result = np.matmul(*operands) + _wide(sum_).data.astype(np.float32)
        if _is_bf16(sum_):
            return _repack(result)
        return TensorHandle(result.astype(sum_.data.dtype), sum_.dtype.scalar)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = repaired_cast, repaired_convert, repaired_dot
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: TensorHandle(narrow(np.array([value])), tl.bfloat16)


def _repair_reductions() -> None:
    reduce_, scan = interpreter.ReduceOps, interpreter.ScanOps
    total, extreme, sums, products = reduce_.sum, reduce_.min_max, scan.cumsum, scan.cumprod

    def is_bf16(tensor: tl.tensor) -> bool:
        return tensor.dtype == tl.bfloat16

    def wide(tensor: tl.tensor) -> tl.tensor:
        kind = tl.block_type(tl.float32, list(tensor.shape)) if tensor.type.is_block() else tl.float32
        return tl.tensor(_wide(tensor.handle), kind)

    def slim(tensor: tl.tensor) -> tl.tensor:
        kind = tl.block_type(tl.bfloat16, list(tensor.shape)) if tensor.type.is_block() else tl.bfloat16
        return tl.tensor(TensorHandle(narrow(tensor.handle.data), tl.bfloat16), kind)

    def repaired_sum(self: Any, tensor: tl.tensor) -> tl.tensor:
        if not is_bf16(tensor):
            return total(self, tensor)
        # A GPU adds two at a time and rounds every sum; the sizes are powers of two.
        values = widen(tensor.handle.data)
        axis = self.axis
        if axis is None:
            values, axis = values.reshape(-1), 0
        while values.shape[axis] > 1:
            left, right = np.split(values, 2, axis)
            values = widen(narrow(left + right))
        if not self.keep_dims:
            values = values.squeeze(axis)
        elif self.axis is None:
            values = values.reshape((1,) * tensor.handle.data.ndim)
        return self.to_tensor(narrow(values), tl.bfloat16)

    def repaired_extreme(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor
        if not is_bf16(tensor):
            return extreme(self, tensor, *args, **kwargs)
        found = extreme(self, wide(tensor), *args, **kwargs)
        return (slim(found[0]), found[1]) if isinstance(found, tuple) else slim(found)

    def repaired_scan(original: Callable[..., Any]) -> Callable[..., Any]:
        def repaired(self: Any, tensor: tl.tensor) -> list[Any]:
            return [slim(t) for t in original(self, wide(tensor))] if is_bf16(tensor) else original(self, tensor)

        return repaired

    reduce_.sum, reduce_.min_max = repaired_sum, repaired_extreme
    scan.cumsum, scan.cumprod = repaired_scan(sums), repaired_scan(products)


def _repair_indices() -> None:
    # Triton 3.6 makes an index of an array of one element, which numpy 2.4 refuses.
    patch = interpreter._patch_lang_tensor

    def repaired(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = repaired


if _launch.INTERPRETED and not _launch.repaired_interpreter:
    _repair_arithmetic()
    _repair_reductions()
    _repair_indices()
    _guard_launches()
    _launch.repaired_interpreter = True
