"""What operators and layers cost on paper: launches, bytes, operations, and the time they need at least on an H200.

Nothing runs. The operator is called on tensors without values: Triton launches are recorded instead of made, and a
dispatch mode sees the calls of torch beside them. So is a whole layer, forward and backward, with every operator in it.

Bytes: a Triton launch moves every tensor that it is given once (read or written); a call of torch moves its inputs and
its outputs once, and an argument that it updates in place twice (``addmm_`` reads and writes its accumulator), or once
if it only overwrites it (``copy_``, ``out=``). Views and empty buffers move nothing. What caches save is not counted.

Time: a call of torch takes ``max(bytes / BANDWIDTH, FLOPs / PEAK)``; so do all Triton launches of an operator together,
with the FLOPs of the operator's formula that torch's own products have not done. Launches cost nothing here. It is a
lower bound of this design, not a prediction.

``python -m benchmarks.costs [--steps NAME]`` prints the tables, or every launch of the calls and layers of that name.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import peftk
from peftk.runtime import registry
from peftk.testing.calls import Call

from . import gpu_cells
from .methods import METHODS, Cell
from .results import Results
from .tables import Table, milliseconds

# Measured on an H200: a copy, and a bf16 product.
BANDWIDTH = 4.3e12
PEAK = 790e12

BACKENDS = ("triton", "torch")


def _grouped_flops(x: Tensor, weight: Tensor, *_: object, out_val: object = None, **__: object) -> int:
    """Count those of a product of sorted rows and a weight for each group: every row has one of the weights."""
    return 2 * x.numel() * weight.shape[-1]


# What torch counts none of.
_FORMULAS = {torch.ops.aten._grouped_mm: _grouped_flops}

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
        name: the operator, or the call of it.
        backend: who runs it.
        steps: its launches.
        flops: the operations by the operator's formula.
        reason: why the backend cannot run it; there are no steps then.
    """

    name: str
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


@dataclass(frozen=True)
class LayerCost:
    """What a step of a layer costs on one backend: forward and backward.

    Attributes:
        cell: the layer.
        backend: who runs its operators, but for those that it cannot run, which torch does.
        parts: the cost of every operator, and of what torch does between them, in their order.
    """

    cell: Cell
    backend: str
    parts: tuple[Cost, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """All launches."""
        return tuple(step for part in self.parts for step in part.steps)

    @property
    def bytes(self) -> int:
        """The bytes that all launches move."""
        return sum(part.bytes for part in self.parts)

    @property
    def flops(self) -> int:
        """The operations of all operators."""
        return sum(part.flops for part in self.parts)

    @property
    def seconds(self) -> float:
        """The shortest time of all parts, one after another."""
        return sum(part.seconds for part in self.parts)

    @property
    def stand_ins(self) -> str:
        """The operators that torch runs because the backend cannot."""
        names = (part.name for part in self.parts if part.name != "torch" and part.backend != self.backend)
        return ", ".join(dict.fromkeys(name.removesuffix("_backward") for name in names))

    @property
    def overhead(self) -> float:
        """The share of that time above the two products of the frozen layer."""
        products = 4 * self.cell.tokens * self.cell.features * self.cell.out_features / PEAK
        return self.seconds / products - 1


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
        # Below autograd, `linear` and its like arrive whole; what they launch is what they are made of.
        with self:
            results = func.decompose(*args, **kwargs)
        if results is not NotImplemented:
            return results
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
        # torch has formulas of the products that make a result, not of those that update one in place.
        packet = getattr(torch.ops.aten, name.removesuffix("_"), func._overloadpacket)
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=results))
        self.steps.append(Step(name, False, moved, flops))
        return results


def _run(name: str, backend: str, kernel: Callable, arguments: tuple) -> tuple[Any, Cost]:
    """Run a kernel on tensors without values, and return its results and what it costs."""
    from peftk.triton_kernels import _launch

    flops = int(flop_registry[getattr(torch.ops.peftk, name)](*arguments, out_val=None))
    with _launch.recorded() as launches, _Calls() as seen, torch.no_grad():
        results = kernel(*arguments)
    kernels = [Step(one.name, True, sum(map(_size, _tensors(one.arguments.values()).values()))) for one in launches]
    return results, Cost(name, backend, (*kernels, *seen.steps), flops)


def cost(call: Call, backend: str) -> Cost:
    """Work out what a call costs on a backend: "triton" or "torch"."""
    from peftk.triton_kernels import _launch

    arguments = call.arguments("meta")
    with _launch.recorded():
        if reason := call.reason(backend, arguments):
            return Cost(str(call), backend, (), 0, reason)
        # Constants, such as a Fourier matrix, are made once.
        call.bind(backend, arguments)()
    _, found = _run(call.operator, backend, call.bind(backend, arguments).func, arguments)
    return replace(found, name=str(call))


class _Parts(_Calls):
    """Collects the operators of peftk, on a backend or, where it cannot, on torch, and what torch does between them."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.parts: list[Cost] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace != "peftk":
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.collect()
        name = func._schema.name.partition("::")[2]
        operator = registry.OPERATORS[name]
        backend = "torch" if operator.reason(self.backend, args) else self.backend
        results, found = _run(name, backend, operator.kernel(backend)[0], args)
        self.parts.append(found)
        return results

    def collect(self) -> None:
        """Make a part of the calls of torch since the last operator."""
        if self.steps:
            steps, self.steps = tuple(self.steps), []
            self.parts.append(Cost("torch", self.backend, steps, sum(step.flops for step in steps)))


def layer_cost(cell: Cell, backend: str) -> LayerCost:
    """Work out what a step of a layer costs, x requiring grad, on a backend: "triton" or "torch"."""
    from peftk.triton_kernels import _launch

    method = METHODS[cell.method]
    # Made on the CPU: some layers look at the values of the weight. Nobody has set them here.
    base = nn.utils.skip_init(nn.Linear, cell.features, cell.out_features, dtype=cell.dtype).requires_grad_(False)
    config = method.make_config(peftk, cell)
    layer = peftk.nn.layer_class_for(config, base)(base, config).to("meta")
    x = torch.empty(cell.tokens, cell.features, dtype=cell.dtype, device="meta").requires_grad_()
    grad = torch.empty(cell.tokens, cell.out_features, dtype=cell.dtype, device="meta")
    for parameter in method.find(layer).values():
        parameter.data = parameter.data.to(cell.parameters)
    with _launch.recorded():
        for _ in range(2):
            # Constants are made in the first step.
            layer.zero_grad()
            x.grad = None
            with _Parts(backend) as seen:
                layer(x).backward(grad)
                seen.collect()
    return LayerCost(cell, backend, tuple(seen.parts))


def calls() -> Iterator[Call]:
    """Yield the calls of the GPU table, forward and backward side by side."""
    tokens, features, outs = gpu_cells.TOKENS, gpu_cells.FEATURES, gpu_cells.OUTS
    for operator, sizes, widths in (
        ("low_rank_linear", (16, 64), outs),
        ("block_rotate_linear", (32, 64, 256), outs),
        ("circulant_linear", (128,), outs[:1]),
        ("kronecker_linear", (8,), outs[:1]),
    ):
        for out in widths:
            for size in sizes:
                for suffix in ("", "_backward"):
                    yield Call(f"{operator}{suffix}", tokens, features, out, size, torch.bfloat16)
    yield from sorted(gpu_cells.kernel_calls(), key=lambda call: (call.forward, call.size, call.variant, call.backward))


def cells() -> list[Cell]:
    """Return the square layers of the GPU table."""
    return [*gpu_cells.layer_cells(gpu_cells.FEATURES), *gpu_cells.relative_cells()]


@functools.cache
def costs() -> tuple[tuple[Call, Cost], ...]:
    """Work out the costs of all calls, on Triton and on plain PyTorch."""
    return tuple((call, cost(call, backend)) for call in calls() for backend in BACKENDS)


@functools.cache
def layer_costs() -> tuple[LayerCost, ...]:
    """Work out the costs of all layers, on Triton and on plain PyTorch."""
    return tuple(layer_cost(cell, backend) for cell in cells() for backend in BACKENDS)


def _measured(results: Results | None, suite: str, cell: str, arm: str) -> str:
    for comparison in results.of(suite) if results else ():
        row = comparison.rows.get(arm)
        on_gpu = comparison.info.get("clock") == "events"
        if on_gpu and comparison.info["cell"] == cell and row is not None and row.measured:
            return milliseconds(row.found["median_us"])
    return "not measured"


def _columns(found: Cost | LayerCost) -> tuple[str, ...]:
    kernels = sum(step.triton for step in found.steps)
    return (
        f"{kernels} + {len(found.steps) - kernels}",
        f"{found.bytes / 2**20:.1f}",
        f"{found.flops / 1e9:.2f}",
        milliseconds(1e6 * found.seconds),
    )


def _layer_table(results: Results | None) -> Table:
    rows = []
    for found in layer_costs():
        cell = found.cell
        method = METHODS[cell.method]
        name = f"{method.title} {method.size_text(cell.size)}"
        target = method.gpu_targets.get(cell.size)
        rows.append(
            (
                name if cell.parameters is cell.dtype else f"{name}, float32 adapter",
                found.backend + (f", torch: {found.stand_ins}" if found.stand_ins else ""),
                *_columns(found),
                f"+{100 * found.overhead:.1f} %",
                f"+{100 * (target - 1):.0f} %" if target else "",
                _measured(results, "layers", f"{cell}-forward+backward", f"peftk-{found.backend}"),
            )
        )
    return Table(
        "Costs of layers on paper, for an H200",
        f"Forward and backward of peftk's layers, {gpu_cells.TOKENS} x {gpu_cells.FEATURES} -> {gpu_cells.FEATURES}, "
        "bf16: everything that a step launches, counted as in the next table, above the two bare products at "
        f"{PEAK / 1e12:g} TFLOP/s. Beside it what is asked for on the GPU, launches and caches included. Nothing here "
        "is a measurement but the last column.",
        ("layer", "backend", "launches", "MiB moved", "GFLOP", "at least", "over the products", "target", "GPU time"),
        rows,
    )


def tables(results: Results | None = None) -> list[Table]:
    """Return the tables of costs; the times of a GPU stand in them where the results have them."""
    rows = []
    for call, found in costs():
        if found.reason:
            rows.append((found.name, found.backend, *["-"] * 5, f"cannot run: {found.reason}"))
            continue
        product = call.product_flops / PEAK
        rows.append(
            (
                found.name,
                found.backend,
                *_columns(found),
                f"+{100 * (found.seconds / product - 1):.1f} %" if product else "",
                _measured(results, "gpu-kernels", found.name, found.backend),
            )
        )
    return [
        _layer_table(results),
        Table(
            "Costs on paper, for an H200",
            "Nothing here is a measurement but the last column. Launches: Triton kernels + calls of torch. Bytes: "
            "every tensor that a launch reads or writes, once (an accumulator twice). FLOPs: the operator's formula. "
            f"At least: each launch at {BANDWIDTH / 1e12:g} TB/s or {PEAK / 1e12:g} TFLOP/s, whichever takes longer, "
            "one after another, launches free; beside it what that is above the bare product. Calls: operator, tokens, "
            "sizes, block size, rank or size of the first factor, dtype.",
            ("call", "backend", "launches", "MiB moved", "GFLOP", "at least", "over the product", "GPU time"),
            rows,
        ),
    ]


def steps(name: str) -> Iterator[tuple[str, ...]]:
    """Yield every launch of the calls and layers whose name has this in it: what, where, kind, MiB, GFLOP and time."""
    whole = [(str(found.cell), (*found.parts,)) for found in layer_costs() if name in str(found.cell)]
    for title, parts in [*whole, *((found.name, (found,)) for _, found in costs() if name in found.name)]:
        for part in parts:
            where = f"{title}, {part.backend}"
            for step in part.steps:
                seconds = max(step.bytes / BANDWIDTH, step.flops / PEAK)
                kind = "Triton" if step.triton else "torch"
                moved, flops = f"{step.bytes / 2**20:.2f} MiB", f"{step.flops / 1e9:.2f} GFLOP"
                yield where, part.name, kind, step.name, moved, flops, milliseconds(1e6 * seconds)


def _print(rows: Iterable[tuple[str, ...]]) -> None:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, or the launches of some calls and layers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", metavar="NAME", help="every launch of the calls and layers with this in their name")
    options = parser.parse_args(arguments)
    if options.steps:
        _print(steps(options.steps))
        return
    for table in tables():
        print(table.title, table.note, "", sep="\n")
        _print((table.header, *table.rows))
        print()


if __name__ == "__main__":
    main()
