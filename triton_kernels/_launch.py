"""How every Triton kernel is launched, and on which tensors it may be."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ..runtime import settings

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

repaired_interpreter = False
"""Set by peftk.testing.triton_interpreter, which mends the interpreter's bfloat16 arithmetic."""

_recorder: list[Launch] | None = None


@triton.jit
def _nothing():
    pass


INTERPRETED = isinstance(_nothing, InterpretedFunction)
"""Whether TRITON_INTERPRET=1 was set when this process first imported the kernels."""


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, its arguments by name, and the options it is compiled with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """The kernel's name, without the leading underscore."""
        return self.kernel.__name__.removeprefix("_")


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int, num_stages: int = 1, **arguments: Any) -> None:
    """Launch a kernel on the device of its first tensor, or only note it down inside `recorded`."""
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, arguments, options))
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments, **options)
    else:
        kernel[grid](**arguments, **options)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches made inside instead of running them.

    With tensors on the device "meta" this shows what a call of any size would launch: exactly the kernels,
    grids, arguments and options that a GPU would get, which is what the proofs compile and the cost table counts.
    """
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before


@functools.cache
def capability_of(index: int) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, kept because every call asks and torch looks it up each time."""
    return torch.cuda.get_device_capability(index)


def unsupported(x: Tensor) -> str | None:
    """Return None if the kernels can read a tensor like x, else the reason why they cannot."""
    if x.dtype not in DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16; got {x.dtype}"
    if _recorder is not None and x.device.type == "meta":
        return None
    if x.device.type == "cpu" and INTERPRETED:
        if settings.backend() != "triton":
            return "Triton interprets its kernels on the CPU only where it is named"
        if x.dtype is torch.bfloat16 and not repaired_interpreter:
            return "Triton's interpreter computes bfloat16 wrongly; import peftk.testing.triton_interpreter to mend it"
        return None
    if x.device.type != "cuda":
        return f"the Triton kernels take CUDA tensors; got one on {x.device}"
    if torch.version.hip is None and capability_of(x.device.index) < (8, 0):
        return f"the Triton kernels need compute capability 8.0; {x.device} has less"
    return None
