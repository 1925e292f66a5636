"""The ways through every method that `tests/methods` runs: plain layers of torch, tensors, and a dense formula.

A module of this package belongs to one method, and holds its `FORMS`. It sees functions of tensors alone, no layer of
the package: that is what those functions are for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

I, O, TOKENS = 12, 8, 5  # noqa: E741

Tensors = dict[str, Tensor]
Dense = tuple[Tensor, Tensor | None]


class Opaque(nn.Linear):
    """A linear layer that may only be called, as a quantised one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Conv1D(nn.Module):
    """Stores its weight as (in, out); only the name of the class tells it from others."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


def _called() -> nn.Linear:
    layer = nn.Linear(I, O)
    layer.register_forward_hook(lambda *_: None)
    return layer


IMAGES = ("conv", "pointwise", "circular")
"""The convolutions of two dimensions."""

PLAIN = ("fused", "no bias")
"""The linear layers whose call nobody would miss."""

BASES: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "linear": {
        "fused": lambda: nn.Linear(I, O),
        "no bias": lambda: nn.Linear(I, O, bias=False),
        "called": _called,
        "opaque": lambda: Opaque(I, O),
        "Conv1D": lambda: Conv1D(O, I),
    },
    "conv": {
        "conv": lambda: nn.Conv2d(4, 8, 3, padding=1),
        "pointwise": lambda: nn.Conv2d(4, 8, 1),
        "circular": lambda: nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular"),
        "sequence": lambda: nn.Conv1d(4, 8, 2, padding="same", padding_mode="reflect"),
        "volume": lambda: nn.Conv3d(4, 8, (1, 3, 2), padding=(0, 1, 1)),
    },
    "embedding": {"embedding": lambda: nn.Embedding(I, O)},
}
"""The layers by kind and name."""


@dataclass(frozen=True)
class Form:
    """One way through a method.

    Attributes:
        kind: Which of `BASES` it is for.
        shapes: The tensors of the adapters by name, for the shape of a weight with the outputs as rows.
        run: What the method computes: (base, x, tensors).
        weight: The dense weight and the bias, from those of the base and the tensors, in plain PyTorch.
        merged: What the method itself makes of weight and bias, or None if it cannot be merged.
        bases: Which layers of the kind; all of them if empty.
    """

    kind: str
    shapes: Callable[[torch.Size], dict[str, tuple[int, ...]]]
    run: Callable[[nn.Module, Tensor, Tensors], Tensor]
    weight: Callable[[Tensor, Tensor | None, Tensors], Dense]
    merged: Callable[[Tensor, Tensor | None, Tensors], Dense] | None = None
    bases: tuple[str, ...] = ()


def single(weight: torch.Size) -> tuple[int, ...]:
    """The kernel of a single tap in as many dimensions as that of a weight."""
    return (1,) * (len(weight) - 2)


_METHODS = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
FORMS: dict[str, tuple[Form, Callable[[], nn.Module]]] = {
    f"{method.__name__.rpartition('.')[2]} {name}": (form, base)
    for method in _METHODS
    for form in method.FORMS
    for name, base in BASES[form.kind].items()
    if name in form.bases or not form.bases
}
"""Every form on every layer, by method and layer."""
