"""The comparisons of the GPU benchmark. On a CPU, with tiny sizes, they run too, which only tries them out."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import peftk
from peftk.runtime import registry, settings
from peftk.testing.calls import KINDS, Call, operators
from peftk.testing.cases.cayley import transform
from peftk.testing.compare import LIMITS, error

from . import truth
from .arms import Arm, environment
from .gpu_timing import inspect, time_arms
from .methods import Cell, available
from .peers import Bench, why_no_compiler
from .plain import PLAIN

BF16, F32 = torch.bfloat16, torch.float32
TOKENS, FEATURES, RANK = 8192, 4096, 16
OUTS = (4096, 11008, 14336)
Info = dict[str, Any]


def _headline() -> list[tuple[str, int]]:
    """Return the methods of the first table, each with its sizes: all of them at their first one, then at the next."""
    methods = [method for method in available().values() if method.headline]
    most = max(len(method.gpu_sizes) for method in methods)
    return [(m.name, m.gpu_sizes[i]) for i in range(most) for m in methods if i < len(m.gpu_sizes)]


def layer_cells(out: int) -> list[Cell]:
    """Return the layers of one width; the square ones with float32 adapters too, which are the default of the field."""
    width = 0 if out == FEATURES else out
    sizes = _headline()
    cells = [Cell(method, size, FEATURES, TOKENS, BF16, BF16, width) for method, size in sizes]
    if not width:
        cells[2:2] = [Cell(method, size, FEATURES, TOKENS, BF16, F32) for method, size in sizes[:2]]
    return cells


def relative_cells() -> list[Cell]:
    """Return the square layers of the other methods."""
    others = (method for method in available().values() if not method.headline)
    return [Cell(m.name, size, FEATURES, TOKENS, BF16, BF16) for m in others for size in m.gpu_sizes]


def kernel_calls() -> list[Call]:
    """Return the raw operators at the sizes of the table."""
    found = []
    for name, kind in KINDS.items():
        dtype = BF16 if BF16 in kind.dtypes else F32
        tokens = TOKENS if kind.tokens else 0
        for operator in operators(name):
            for size in kind.gpu_sizes:
                for variant in kind.variants if len(kind.variants) > 1 else ("",):
                    found.append(Call(operator, tokens, FEATURES, FEATURES, size, dtype, variant))
    return found


def _finish(info: Info, found: dict[str, Any], device: str, reference: str) -> Info:
    versions = {} if torch.version.cuda is None else {"cuda": torch.version.cuda}
    machine = environment(device)
    machine["versions"].update(versions)
    clock = "events" if torch.device(device).type == "cuda" else "wall"
    return {**info, **machine, **found, "reference": reference, "clock": clock, "load_after": os.getloadavg()[0]}


def _bare(bench: Bench) -> Arm:
    """The products of the frozen layer themselves: two calls of the vendor's library, without autograd."""
    x, grad, weight, bias = bench.x.detach(), bench.grad, bench.base.weight, bench.base.bias
    frozen = bench.frozen()

    def check() -> dict[str, float]:
        product = (x.double() @ weight.double().mT + bias.double(), grad.double() @ weight.double())
        found = torch.addmm(bias, x, weight.mT), grad @ weight
        return {n: error(a, t).norm for n, a, t in zip(("output", "dx"), found, product, strict=True)}

    return dataclasses.replace(
        frozen,
        step=lambda: (torch.addmm(bias, x, weight.mT), grad @ weight),
        forward=lambda: torch.addmm(bias, x, weight.mT),
        check=check,
        note="the bare products: addmm forward, and one for the gradient in x; no autograd",
    )


def _within(arm: Arm, name: str, context: Callable[[], AbstractContextManager], note: str) -> Arm:
    """Return an arm that runs inside a context."""

    def wrap(function: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> Any:
            with context():
                return function()

        return inside

    step, forward, check = wrap(arm.step), wrap(arm.forward), wrap(arm.check)
    return dataclasses.replace(arm, name=name, step=step, forward=forward, check=check, note=note, found={})


def layer(cell: Cell, device: str, seconds: float, peers: bool = True) -> Iterator[Info]:
    """Yield the comparison of one layer, forward + backward and forward alone."""
    bench = Bench(cell, device=device)
    arms: list[tuple[Arm, str | None]] = [(bench.peftk(), None), (_bare(bench), None)]
    arms += [(bench.peftk(backend), backend) for backend in settings.BACKENDS]
    if cell.method == "lora":
        from peftk.triton_kernels import low_rank

        for design in low_rank.DESIGNS:
            context = lambda design=design: low_rank.use_design(design)  # noqa: E731
            note = f"backend 'triton' named, design {design}"
            arms.append((_within(bench.peftk("triton"), f"peftk-triton-{design}", context, note), "triton"))
    if peers:
        for name, make in (("hf", bench.hugging_face), ("compile", bench.compiled), ("lycoris", bench.lycoris)):
            try:
                arms.append((make(), None))
            except Exception as failure:
                message = (str(failure).strip().splitlines() or [""])[0][:200]
                arms.append((Arm(name, skip=f"cannot be made: {type(failure).__name__}: {message}"), None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for arm, backend in arms:
            # As many for every width.
            inspect(arm, device, backend, launches=cell.out_features == cell.features)
    info = {
        "method": cell.method,
        "tokens": cell.tokens,
        "in_features": cell.features,
        "out_features": cell.out_features,
        "size": cell.size,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "parameters": str(cell.parameters).removeprefix("torch."),
    }
    for suite, mode in (("layers", "forward+backward"), ("layers-forward", "forward")):
        found = time_arms([arm for arm, _ in arms], device, seconds, "frozen", forward=mode == "forward")
        yield _finish({"suite": suite, "cell": f"{cell}-{mode}", "mode": mode, **info}, found, device, "frozen")


def _info(suite: str, call: Call, cell: str, mode: str) -> Info:
    return {
        "suite": suite,
        "cell": cell,
        "method": call.operator,
        "mode": mode,
        "tokens": call.tokens,
        "in_features": call.features,
        "out_features": call.out,
        "size": call.size,
        "dtype": str(call.dtype).removeprefix("torch."),
        "parameters": "float32",
    }


@torch.no_grad()
def kernel(call: Call, device: str, seconds: float) -> Iterator[Info]:
    """Yield the comparison of one raw operator on every backend."""
    arguments = call.arguments(device)
    exact = call.truth(arguments)
    arms = []
    for backend in settings.BACKENDS:
        if reason := call.reason(backend, arguments):
            arms.append(Arm(backend, skip=reason))
            continue
        step = call.bind(backend, arguments)

        def check(step: Callable[[], Any] = step) -> dict[str, float]:
            return {"result": call.error(step(), exact)}

        arms.append(Arm(backend, step, check, call.limit, note=f"the {backend} kernel itself, without the registry"))
    for arm in arms:
        inspect(arm, device)
    found = time_arms(arms, device, seconds, "torch")
    mode = "backward" if call.operator.endswith("_backward") else "forward"
    yield _finish(_info("gpu-kernels", call, str(call), mode), found, device, "torch")


def cayley(size: int, neumann: bool, device: str, seconds: float, features: int = FEATURES) -> Iterator[Info]:
    """Yield the comparison of the Cayley transform as a function, forward + backward, beside its peers."""
    generator = torch.Generator(device).manual_seed(0)
    count, triangle = features // size, size * (size - 1) // 2
    values = 0.3 / size * torch.randn(count, triangle, generator=generator, device=device)
    grad = torch.randn(count, size, size, generator=generator, device=device)
    terms = 5 if neumann else None
    exact = truth.differentiate(lambda packed: transform(packed, size, terms), {"packed": values}, grad)
    plain = PLAIN["cayley"]

    def arm(name: str, forward: Callable[[Tensor], Tensor], note: str, backend: str | None = None) -> Arm:
        leaf = values.clone().requires_grad_()

        def step() -> Tensor:
            leaf.grad = None
            y = forward(leaf)
            y.backward(grad)
            return y

        def check() -> dict[str, float]:
            return truth.errors({"output": run(), "dpacked": leaf.grad}, exact)

        unnamed = Arm(name, step, check, LIMITS[F32], lambda: [leaf, grad], note, forward=lambda: forward(leaf))
        if backend is None:
            run = step
            return unnamed
        named = _within(unnamed, name, lambda: peftk.use_backend(backend), note)
        run = named.step
        return named

    def ours(packed: Tensor) -> Tensor:
        return peftk.functional.cayley(packed, size, neumann_terms=terms)

    arms = [(arm("peftk", ours, "the backends are named in the row"), None)]
    arms += [(arm(f"peftk-{b}", ours, f"backend {b!r} named", b), b) for b in settings.BACKENDS]
    arms.append((arm("eager", lambda packed: plain(packed, size, terms), "plain PyTorch"), None))
    if reason := why_no_compiler(device):
        arms.append((Arm("compile", skip=reason), None))
    else:
        torch._dynamo.reset()
        graph = torch.compile(lambda packed: plain(packed, size, terms), fullgraph=True, dynamic=False)
        arms.append((arm("compile", graph, "plain PyTorch, torch.compile (inductor)"), None))
    try:
        from peft.tuners.oft.layer import OFTRotationModule

        theirs = OFTRotationModule(count, triangle, size, features, use_cayley_neumann=neumann).to(device)
        forward = lambda packed: theirs._cayley_batch(packed, size, neumann)  # noqa: E731
        arms.append((arm("hf", forward, "HF PEFT's own function, eager"), None))
    except ImportError as failure:
        arms.append((Arm("hf", skip=f"cannot be imported: {failure}"), None))
    for each, backend in arms:
        inspect(each, device, backend)
    call = Call("cayley", 0, features, features, size, F32, "neumann" if neumann else "exact")
    for suite, mode in (("gpu-cayley", "forward+backward"), ("gpu-cayley-forward", "forward")):
        found = time_arms([a for a, _ in arms], device, seconds, "eager", forward=mode == "forward")
        yield _finish(_info(suite, call, f"{call}-{mode}", mode), found, device, "eager")


@torch.no_grad()
def gemm(
    out: int, device: str, seconds: float, tokens: int = TOKENS, features: int = FEATURES, dtype: torch.dtype = BF16
) -> Iterator[Info]:
    """Yield Triton's product with LoRA inside (D1) beside the vendor's alone: forward, and for the gradient in x."""
    from peftk.triton_kernels import low_rank, low_rank_gemm

    call = Call("low_rank_linear", tokens, features, out, RANK, dtype)
    arguments = call.arguments(device)
    x, weight, bias, a, b = arguments[:5]
    exact = call.truth(arguments)[:1]
    bare = (x.double() @ weight.double().mT + bias.double(),)

    def arm(name: str, step: Callable[[], Any], expected: tuple, note: str, skip: str | None = None) -> Arm:
        def check() -> dict[str, float]:
            return {"output": call.error(_first(step()), expected)}

        return Arm(name, step, check, call.limit, note=note, skip=skip)

    reason = call.reason("triton", arguments)
    arms = [arm("cublas", lambda: torch.addmm(bias, x, weight.mT), bare, "the vendor's product alone")]
    for design in low_rank.DESIGNS:

        def run(design: str = design) -> Any:
            with low_rank.use_design(design):
                return registry.OPERATORS["low_rank_linear"].kernel("triton")[0](*arguments)

        arms.append(arm(design, run, exact, f"the product with LoRA r{RANK}, shrink included", reason))
    yield from _products(arms, call, "forward", device, seconds)
    grad = torch.randn(tokens, out, device=device, generator=torch.Generator(device).manual_seed(2)).to(dtype)
    dhidden = (grad.double() @ b.double()).to(dtype)
    bare = (grad.double() @ weight.double(),)
    both = (bare[0] + dhidden.double() @ a.double(),)
    d1 = lambda: low_rank_gemm.extended_linear(grad, weight, None, dhidden, a, transposed=True)  # noqa: E731
    reason = reason or low_rank_gemm.unsupported(grad, weight, RANK)
    arms = [
        arm("cublas", lambda: grad @ weight, bare, "the vendor's product alone"),
        arm("D0", lambda: (grad @ weight).addmm_(dhidden, a), both, "then the low-rank product in place"),
        arm("D0-expand-first", lambda: (dhidden @ a).addmm_(grad, weight), both, "the low-rank product first"),
        arm("D1", d1, both, f"one Triton product, rank {RANK} inside", reason),
    ]
    yield from _products(arms, call, "dx", device, seconds)


def _products(arms: list[Arm], call: Call, mode: str, device: str, seconds: float) -> Iterator[Info]:
    for each in arms:
        inspect(each, device)
    found = time_arms(arms, device, seconds, "cublas")
    yield _finish(_info("gpu-gemm", call, f"{call}-{mode}", mode), found, device, "cublas")


def _first(results: Any) -> Tensor:
    return results if isinstance(results, Tensor) else results[0]
