"""Float64 truths: a naive formula differentiated, and what is found compared with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftk.testing.compare import error

Values = dict[str, Tensor]


def differentiate(formula: Callable[..., Tensor], values: Values, grad: Tensor) -> Values:
    """Return the output and the gradient in every value, in float64, for an incoming gradient."""
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    y = formula(**exact)
    gradients = torch.autograd.grad(y, list(exact.values()), grad.double()) if exact else ()
    return {"output": y.detach(), **{f"d{name}": g for name, g in zip(exact, gradients, strict=True)}}


def errors(found: Values, truth: Values) -> dict[str, float]:
    """Return the relative error, in the Frobenius norm, of everything that the truth names."""
    return {name: error(found[name], exact).norm for name, exact in truth.items()}
