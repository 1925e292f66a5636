"""What every operator costs on paper: launches, bytes, operations, and the time they need at least on an H200.

Nothing runs. The operator is called on tensors without values: Triton launches are recorded instead of made, and a
dispatch mode sees the calls of torch beside them.

Bytes: a Triton launch moves every tensor that it is given once (read or written); a call of torch moves its inputs and
its outputs once, and an argument that it updates in place twice (``addmm_`` reads and writes its accumulator), or once
if it only overwrites it (``copy_``, ``out=``). Views and empty buffers move nothing. What caches save is not counted.

Time: a call of torch takes ``max(bytes / BANDWIDTH, FLOPs / PEAK)``; so do all Triton launches of an operator together,
with the FLOPs of the operator's formula that torch's own products have not done. Launches cost nothing here. It is a
lower bound of this design, not a prediction.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from peftk.testing.calls import Call

from .results import Results
from .tables import Table, milliseconds

# Measured on an H200: a copy, and a bf16 product.
BANDWIDTH = 4.3e12
PEAK = 790e12

TOKENS, FEATURES, OUTS = 8192, 4096, (4096, 11008, 14336)
BF16, F32 = torch.bfloat16, torch.float32

_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "_unsafe_view")
_OVERWRITES = ("copy_", "zero_", "fill_")


@dataclass(frozen=True)
class Step:
    """One launch: the name of a kernel or of a call of torch, and what it moves and computes.

    A Triton launch has no FLOPs of its own: see `Cost`.
    """

    name: str
    triton: bool
    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Cost:
    """What a call of an operator costs on one backend.

    Attributes:
        call: the call.
        backend: who runs it.
        steps: its launches.
        flops: the operations by the operator's formula.
        reason: why the backend cannot run it; there are no steps then.
    """

    call: Call
    backend: str
    steps: tuple[Step, ...]
    flops: int
    reason: str | None = None

    @property
    def bytes(self) -> int:
        """The bytes that all launches move."""
        return sum(step.bytes for step in self.steps)

    @property
    def seconds(self) -> float:
        """The shortest time of the launches, one after another."""
        others = [step for step in self.steps if not step.triton]
        total = sum(max(step.bytes / BANDWIDTH, step.flops / PEAK) for step in others)
        moved = sum(step.bytes for step in self.steps if step.triton)
        rest = max(0, self.flops - sum(step.flops for step in others)) if moved else 0
        return total + max(moved / BANDWIDTH, rest / PEAK)


def _size(tensor: Tensor) -> int:
    # An expanded tensor holds less than it shows.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _key(tensor: Tensor) -> tuple:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)


def _tensors(values: Iterable[Any]) -> dict[tuple, Tensor]:
    """Return the tensors among values, in lists and in TMA descriptors, each of them once."""
    found: dict[tuple, Tensor] = {}
    for value in values:
        value = getattr(value, "base", value) if not isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            found[_key(value)] = value
        elif isinstance(value, (list, tuple)):
            found.update(_tensors(value))
    return found


class _Calls(TorchDispatchMode):
    """Collects the calls of torch that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name in _FREE or func.is_view:
            return results
        inputs = _tensors((*args, *kwargs.values()))
        moved = sum(map(_size, inputs.values()))
        moved += sum(_size(t) for key, t in _tensors([results]).items() if key not in inputs)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and name not in _OVERWRITES:
                moved += sum(map(_size, _tensors([value]).values()))
        formula = flop_registry.get(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=results))
        self.steps.append(Step(name, False, moved, flops))
        return results


def cost(call: Call, backend: str) -> Cost:
    """Work out what a call costs on a backend: "triton" or "torch"."""
    from peftk.triton_kernels import _launch

    arguments = call.arguments("meta")
    flops = int(flop_registry[getattr(torch.ops.peftk, call.operator)](*arguments, out_val=None))
    with _launch.recorded() as launches:
        if reason := call.reason(backend, arguments):
            return Cost(call, backend, (), flops, reason)
        with _Calls() as seen, torch.no_grad():
            call.bind(backend, arguments)()
    kernels = [Step(one.name, True, sum(map(_size, _tensors(one.arguments.values()).values()))) for one in launches]
    return Cost(call, backend, (*kernels, *seen.steps), flops)


def calls() -> Iterator[Call]:
    """Yield the calls of the GPU table, forward and backward side by side."""
    for operator, sizes, outs, dtype in (
        ("low_rank_linear", (16, 64), OUTS, BF16),
        ("block_rotate_linear", (32, 64, 256), OUTS, BF16),
        ("low_rank_add", (16, 64), (FEATURES,), BF16),
        ("block_rotate", (8, 32, 64, 256), (FEATURES,), BF16),
        ("cayley", (32, 64, 256), (FEATURES,), F32),
    ):
        for out in outs:
            for size in sizes:
                for variant in ("neumann", "exact") if operator == "cayley" else ("",):
                    for suffix in ("", "_backward"):
                        tokens = 0 if operator == "cayley" else TOKENS
                        yield Call(f"{operator}{suffix}", tokens, FEATURES, out, size, dtype, variant)


@functools.cache
def costs() -> tuple[Cost, ...]:
    """Work out all costs, on Triton and on plain PyTorch."""
    return tuple(cost(call, backend) for call in calls() for backend in ("triton", "torch"))


def _measured(results: Results | None, found: Cost) -> str:
    for comparison in results.of("gpu-kernels") if results else ():
        row = comparison.rows.get(found.backend)
        on_gpu = comparison.info.get("clock") == "events"
        if on_gpu and comparison.info["cell"] == str(found.call) and row is not None and row.measured:
            return milliseconds(row.found["median_us"])
    return "not measured"


def tables(results: Results | None = None) -> list[Table]:
    """Return the table of costs; the times of a GPU stand in it where the results have them."""
    rows = []
    for found in costs():
        if found.reason:
            rows.append((str(found.call), found.backend, *["-"] * 5, f"cannot run: {found.reason}"))
            continue
        kernels = sum(step.triton for step in found.steps)
        product = found.call.product_flops / PEAK
        rows.append(
            (
                str(found.call),
                found.backend,
                f"{kernels} + {len(found.steps) - kernels}",
                f"{found.bytes / 2**20:.1f}",
                f"{found.flops / 1e9:.2f}",
                milliseconds(1e6 * found.seconds),
                f"+{100 * (found.seconds / product - 1):.1f} %" if product else "",
                _measured(results, found),
            )
        )
    return [
        Table(
            "Costs on paper, for an H200",
            "Nothing here is a measurement but the last column. Launches: Triton kernels + calls of torch. Bytes: "
            "every tensor that a launch reads or writes, once (an accumulator twice). FLOPs: the operator's formula. "
            f"At least: each launch at {BANDWIDTH / 1e12:g} TB/s or {PEAK / 1e12:g} TFLOP/s, whichever takes longer, "
            "one after another, launches free; beside it what that is above the bare product. Calls: operator, tokens, "
            "sizes, block size or rank, dtype.",
            ("call", "backend", "launches", "MiB moved", "GFLOP", "at least", "over the product", "GPU time"),
            rows,
        )
    ]


def main() -> None:
    """Print the table."""
    (table,) = tables()
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    print(table.title, table.note, "", sep="\n")
    for row in (table.header, *table.rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
