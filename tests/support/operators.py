"""What tests of operators share: their cases, the dtypes they run in, and one call of one case."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import peftk
from peftk.testing.cases import Case, Inputs, all_cases

CASES = all_cases()
# (activations, parameters): all one dtype, and the field's default of float32 adapters on a half-precision base.
DTYPES = {
    "f64": (torch.float64, torch.float64),
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-f32": (torch.bfloat16, torch.float32),
    "f16-f32": (torch.float16, torch.float32),
}
GPU_DTYPES = {**DTYPES, "f16": (torch.float16, torch.float16)}
HALVES = ("f16", "f16-f32", "bf16", "bf16-f32")
ROW_DTYPES = ("f32", "f16-f32", "bf16-f32")
"""Those in which one row is made unlike any other."""


def moved(inputs: Inputs, device: torch.device | str) -> Inputs:
    """Return the inputs on a device, but the seed, which is always read on the CPU."""
    return {k: v.to(device) if isinstance(v, Tensor) and k != "seed" else v for k, v in inputs.items()}


def call(case: Case, inputs: Inputs) -> Tensor:
    return case.function(**inputs)


def leaves(case: Case, inputs: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    """Detach the inputs and let those to differentiate in require grad."""
    fresh = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    wanted = {name: fresh[name].requires_grad_() for name in case.gradients}
    return fresh, wanted


def forward_backward(function, case: Case, inputs: Inputs, grad: Tensor | None = None):
    """Return the output and the gradients for one fixed incoming gradient."""
    inputs, wanted = leaves(case, inputs)
    y = function(**inputs)
    if grad is None:
        # A mean of one: sums over tokens do not cancel, so that relative errors mean something.
        grad = 1 + torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if not wanted:
        assert not y.requires_grad
        return y, {}, grad
    grads = torch.autograd.grad(y, list(wanted.values()), grad.to(y), allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted.values(), strict=True)]
    return y, dict(zip(wanted, filled, strict=True)), grad


def as_rows(value: Tensor, last: int) -> Tensor:
    """View a tensor as rows of its last dimensions: (rows, elements)."""
    lead = value.dim() - last
    return value.reshape(value.shape[:lead].numel(), value.shape[lead:].numel())


def row_count(case: Case) -> int:
    """Return how many independent rows the inputs of a case have."""
    rows = case.rows
    return len(as_rows(case.inputs()[rows.arguments[0]], rows.last)) if rows.arguments else 0


def reason_against(case: Case, inputs: Inputs, backend: str) -> str | None:
    with peftk.use_backend(backend):
        explanation = peftk.explain(case.operator, **inputs)
    return next(c.reason for c in explanation.candidates if c.backend == backend)


def max_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the coarsest dtype: a gradient cannot be finer than what it is computed or stored in."""
    return max(dtypes, key=lambda d: torch.finfo(d).eps)


def raw_calls(case: Case, device: torch.device) -> list[tuple[str, tuple]]:
    """Return the raw operator calls, forward and backward, that a case makes."""
    calls: list[tuple[str, tuple]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "peftk":
                detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
                calls.append((func._schema.name.removeprefix("peftk::"), detached))
            return func(*args, **(kwargs or {}))

    inputs, wanted = leaves(case, moved(case.cast(case.inputs(), torch.float32), device))
    with Recorder():
        y = call(case, inputs)
        if wanted:
            torch.autograd.grad(y, list(wanted.values()), torch.ones_like(y), allow_unused=True)
    return calls


ONE_EACH = {c.operator: c for c in CASES if all(t.numel() > 8 for t in leaves(c, c.inputs())[1].values())}
ANY_CASE = pytest.mark.parametrize("case", ONE_EACH.values(), ids=str)
ONE_CASE = pytest.mark.parametrize("case", [c for c in ONE_EACH.values() if c.gradients], ids=str)


def double(case: Case) -> dict:
    return leaves(case, case.inputs())[0]
