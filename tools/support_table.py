"""The table of methods, layers, backends and dtypes in README.md: ``python -m tools.support_table [--check]``.

Every entry comes from a run. A layer is run forward and backward in each dtype, and its calls of operators are noted.
"torch" and "C++, CPU" run it and are held to float64. "C++, CUDA" and "Triton" need no GPU: the predicates of the
kernels are asked about the same calls on CUDA tensors, and the Triton launches are recorded on tensors without values.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftk import use_backend
from peftk.runtime import registry
from peftk.testing.compare import LIMITS, error

from .subjects import PROBES, Subject, subjects

BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
BACKENDS = ("torch", "C++, CPU", "C++, CUDA", "Triton")

Calls = list[tuple[registry.Operator, tuple]]


@dataclass(frozen=True)
class Row:
    """A method on layers that behave alike.

    Attributes:
        method: Its name.
        layers: The kinds of layers.
        entries: What each of `BACKENDS` does.
        refuses: The names of what is refused.
    """

    method: str
    layers: tuple[str, ...]
    entries: tuple[str, ...]
    refuses: frozenset[str]


@contextlib.contextmanager
def _selecting(choose: Callable[[registry.Operator, tuple], Callable]) -> Iterator[None]:
    before = registry.Operator.select
    registry.Operator.select = choose
    try:
        yield
    finally:
        registry.Operator.select = before


def _run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output and all gradients of a forward and a backward pass."""
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if x.is_floating_point():
        x = x.detach().clone().requires_grad_()
        leaves["input"] = x
    for leaf in leaves.values():
        leaf.grad = None
    y = module(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    y.backward(grad)
    return {"output": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def _noted(module: nn.Module, x: Tensor) -> tuple[Calls, dict[str, Tensor]]:
    """Run a module on the torch backend, and return its calls of operators beside the results."""
    calls: Calls = []

    def choose(operator: registry.Operator, args: tuple) -> Callable:
        calls.append((operator, args))
        return operator.kernel("torch")[0]

    with _selecting(choose):
        return calls, _run(module, x)


def _require(found: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype, what: str) -> None:
    for name, value in truth.items():
        distance = error(found[name], value).norm
        if not distance <= LIMITS[dtype]:
            raise AssertionError(
                f"{what}: {name}: expected an error of at most {LIMITS[dtype]:.1e}; got {distance:.1e}"
            )


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _triton(operator: registry.Operator, args: tuple) -> bool:
    """Whether Triton takes the call on CUDA tensors, and launches something for it."""
    from peftk.triton_kernels import _launch

    args = tuple(map(_on_meta, args))
    with _launch.recorded() as launches, torch.no_grad():
        if operator.reason("triton", args) is not None:
            return False
        operator.kernel("triton")[0](*args)
    return bool(launches)


def _compiled_cuda(operator: registry.Operator, args: tuple) -> bool:
    """Whether the CUDA C++ kernels take the call on CUDA tensors, on a GPU that they were built for."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from peftk.kernels.native import _supports

    mode, device = FakeTensorMode(), torch.device("cuda", 0)
    args = tuple(FakeTensor(mode, _on_meta(a), device) if isinstance(a, Tensor) else a for a in args)
    before, _supports.cuda_reason = _supports.cuda_reason, lambda index: None
    try:
        return operator.reason("native", args) is None
    finally:
        _supports.cuda_reason = before


def _native(calls: Calls, module: nn.Module, x: Tensor, truth: dict[str, Tensor], dtype: torch.dtype) -> list[bool]:
    """Say which calls the C++ kernels take on the CPU, after running the layer on them."""
    taken = [operator.reason("native", args) is None for operator, args in calls]
    if all(taken):
        with use_backend("native"):
            found = _run(module, x)
    else:

        def choose(operator: registry.Operator, args: tuple) -> Callable:
            backend = "torch" if operator.reason("native", args) else "native"
            return operator.kernel(backend)[0]

        with _selecting(choose):
            found = _run(module, x)
    _require(found, truth, dtype, f"C++ in {DTYPES[dtype]}")
    return taken


def _entry(taken: dict[torch.dtype, list[bool]]) -> str:
    """Name the dtypes in which all operators run; in brackets those in which some do."""
    whole = [DTYPES[dtype] for dtype, each in taken.items() if each and all(each)]
    some = [DTYPES[dtype] for dtype, each in taken.items() if any(each) and not all(each)]
    if not any(taken.values()):
        return "no operator"
    text = "all" if len(whole) == len(DTYPES) else " ".join(whole)
    return " ".join(filter(None, (text, f"({' '.join(some)})" if some else ""))) or "-"


def row_of(subject: Subject) -> Row:
    """Run a subject and return its row.

    Raises:
        AssertionError: A result is not what it is in float64.
    """
    taken: dict[str, dict[torch.dtype, list[bool]]] = {backend: {} for backend in BACKENDS}
    for dtype in DTYPES:
        module, x = subject.make(dtype), subject.example(dtype)
        exact = x.double() if x.is_floating_point() else x
        _, truth = _noted(copy.deepcopy(module).double(), exact)
        calls, found = _noted(module, x)
        what = f"{subject.method} on {subject.layer}"
        _require(found, truth, dtype, f"{what}: torch in {DTYPES[dtype]}")
        taken["torch"][dtype] = [True]
        taken["C++, CPU"][dtype] = _native(calls, module, x, truth, dtype)
        taken["C++, CUDA"][dtype] = [_compiled_cuda(*call) for call in calls]
        taken["Triton"][dtype] = [_triton(*call) for call in calls]
    return Row(subject.method, (subject.layer,), tuple(_entry(taken[b]) for b in BACKENDS), subject.refuses)


def _one_by_one() -> Iterator[Row]:
    """Run every subject on one thread: its tensors are so small that a second one could only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from map(row_of, subjects())
    finally:
        torch.set_num_threads(threads)


def rows() -> list[Row]:
    """Run everything; layers of one method that behave alike share a row."""
    found: list[Row] = []
    for row in _one_by_one():
        for at, other in enumerate(found):
            if (other.method, other.entries, other.refuses) == (row.method, row.entries, row.refuses):
                found[at] = Row(row.method, other.layers + row.layers, row.entries, row.refuses)
                break
        else:
            found.append(row)
    return found


def markdown(found: list[Row]) -> str:
    """Return the table and what stands below it."""
    rare = {name: [row for row in found if name not in row.refuses] for name in PROBES}
    rare = {name: takers for name, takers in rare.items() if 3 * len(takers) <= len(found)}
    lines = [
        f"| method | layer | {' | '.join(BACKENDS)} | refuses |",
        "|---" * (len(BACKENDS) + 3) + "|",
    ]
    for row in found:
        refuses = ", ".join(name for name in PROBES if name in row.refuses and name not in rare) or "-"
        lines.append(f"| {row.method} | {', '.join(row.layers)} | {' | '.join(row.entries)} | {refuses} |")
    below = [
        "Forward and backward, with float32 adapters on half-precision layers. *all*: f32, bf16, f16, f64. In",
        "brackets: some operators run there, the others on `torch`. *no operator*: plain PyTorch. The first two",
        "columns were run on a CPU and held to float64; the other two are what the kernels say about the same calls on",
        "CUDA tensors, and recorded launches: they were not run on a GPU for this table.",
    ]
    for name, takers in rare.items():
        who = "; ".join(f"{row.method} on {', '.join(row.layers)}" for row in takers)
        said = f"Only {who} take{'s' if len(takers) == 1 else ''} {name}." if who else f"No layer takes {name}."
        below += textwrap.wrap(said, 120, break_on_hyphens=False)
    return "\n".join([*lines, "", *below])


def updated(page: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """Return a page with a table between two markers.

    Raises:
        ValueError: The page has no such markers.
    """
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"page: expected the markers {begin} and {end}")
    return f"{head}{begin}\n{table}\n{end}{tail}"


def run(
    module: str,
    description: str,
    page: Path,
    table: Callable[[], str],
    begin: str,
    end: str,
    arguments: list[str] | None = None,
) -> int:
    """Write a table into a page, or with --check say whether it is up to date; for the modules that make tables.

    Args:
        module: The name of the module, for its help.
        description: What it says of itself.
        page: The page, unless --page names another one.
        table: Makes the table, in Markdown.
        begin: The marker before it.
        end: The marker behind it.
        arguments: Those of the command line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is out of date")
    parser.add_argument("--page", type=Path, default=page)
    options = parser.parse_args(arguments)
    before = options.page.read_text()
    after = updated(before, table(), begin, end)
    if options.check:
        if after == before:
            sys.stdout.write("up to date\n")
            return 0
        lines = [text.splitlines(keepends=True) for text in (before, after)]
        sys.stdout.writelines(unified_diff(*lines, "the page", "this run", n=0))
        sys.stdout.write(f"{options.page.name} is out of date: run this without --check\n")
        return 1
    options.page.write_text(after)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Write the table into README.md, or say whether it is up to date."""
    page = Path(__file__).parents[1] / "README.md"
    return run("tools.support_table", __doc__, page, lambda: markdown(rows()), BEGIN, END, arguments)


if __name__ == "__main__":
    sys.exit(main())
