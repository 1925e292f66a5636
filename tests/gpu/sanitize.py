"""Calls every CUDA C++ kernel on small inputs: the program that compute-sanitizer watches.

Values come from the CPU and go back there, so that hardly a kernel of torch runs beside those under test. It ends with
an error if no kernel took a call, for then there was nothing to watch.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from peftk import _registry
from peftk.testing.cases import all_cases
from peftk.testing.compare import LIMITS, error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Their products with the dense weight run in cuBLAS, which is not under test here.
LEFT_OUT = ("low_rank_add", "low_rank_linear", "block_rotate_linear", "dora_compose", "dora_norm")


def watch(device: str = "cuda", backend: str = "native") -> tuple[int, list[str]]:
    """Run forward and backward operators on one backend; return the number of calls, and what was wrong."""
    calls, wrong = 0, []
    for case in all_cases():
        if case.operator in LEFT_OUT:
            continue
        for dtype in DTYPES:
            inputs = case.cast(case.inputs(), dtype, torch.float32)
            forward = _registry.OPERATORS[case.operator].prepare(**inputs)
            exact = tuple(a.double() if isinstance(a, Tensor) else a for a in forward)
            y = _run(case.operator, "torch", exact)[0]
            for name, args in (
                (case.operator, exact),
                (f"{case.operator}_backward", _backward(case.operator, exact, y)),
            ):
                rounded = tuple(
                    a.to(
                        dtype
                        if case.operator != "cayley" and at < len(args) and _activation(name, at)
                        else torch.float32
                    )
                    if isinstance(a, Tensor)
                    else a
                    for at, a in enumerate(args)
                )
                moved = tuple(a.to(device) if isinstance(a, Tensor) else a for a in rounded)
                if _registry.OPERATORS[name].reason(backend, moved) is not None:
                    continue
                truth = _run(name, "torch", tuple(a.double() if isinstance(a, Tensor) else a for a in rounded))
                found = _run(name, backend, moved)
                calls += 1
                limit = LIMITS[torch.float32 if case.operator == "cayley" else dtype]
                for at, (result, expected) in enumerate(zip(found, truth, strict=True)):
                    # `not <=`, so that a NaN is found too.
                    if not error(result.cpu(), expected).norm <= limit:
                        wrong.append(f"{name} of {case}, {dtype}: result {at} is wrong")
    return calls, wrong


def _activation(name: str, at: int) -> bool:
    """Say whether an argument of `block_rotate` or its backward operator is an activation."""
    return at == 0 or (name.endswith("_backward") and at == 1)


def _backward(operator: str, args: tuple, y: Tensor) -> tuple:
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if operator == "cayley":
        packed, _, polynomial = args
        return grad, packed, y, polynomial
    x, blocks, transpose = args
    return grad, x, blocks, transpose, True, True


def _run(name: str, backend: str, args: tuple) -> tuple[Tensor, ...]:
    kernel = _registry.OPERATORS[name].kernel(backend)
    assert not isinstance(kernel, str), kernel
    results = kernel[0](*args)
    return (results,) if isinstance(results, Tensor) else tuple(results)


def main() -> int:
    """Run all calls and return the exit status."""
    calls, wrong = watch()
    torch.cuda.synchronize()
    print(f"{calls} calls checked")
    print(*wrong, sep="\n")
    if not calls:
        print("no CUDA C++ kernel took a call: was the extension built with PEFTK_BUILD=cuda?")
    return int(bool(wrong) or not calls)


if __name__ == "__main__":
    sys.exit(main())
