"""Modules of LyCORIS's networks, filled, of every algorithm and on every kind of layer, with random options."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

ALGORITHMS: dict[str, Any] = {
    "locon": LoConModule,
    "loha": LohaModule,
    "lokr": LokrModule,
    "diag-oft": DiagOFTModule,
    "boft": ButterflyOFTModule,
}

BASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 16), (3, 5, 12)),
    "no bias": (lambda: nn.Linear(12, 16, bias=False), (7, 12)),
    "sequence": (lambda: nn.Conv1d(4, 8, 3, padding=1), (2, 4, 9)),
    "image": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), (2, 4, 9, 9)),
    "pointwise": (lambda: nn.Conv2d(4, 8, 1), (2, 4, 9, 9)),
    "dilated": (lambda: nn.Conv2d(4, 8, 3, dilation=2), (2, 4, 9, 9)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 9, 9)),
    "volume": (lambda: nn.Conv3d(4, 8, (1, 3, 2)), (2, 4, 3, 5, 4)),
}
"""Layers of every kind, and the shapes of their inputs."""


def options(algorithm: str, draw: random.Random) -> dict[str, Any]:
    """Draw the options of an algorithm."""
    found: dict[str, Any] = {
        "lora_dim": draw.choice([2, 4] if algorithm == "boft" else [1, 2, 4]),
        "multiplier": draw.choice([1, 1.0, 0.7, -1.0]),
        "alpha": draw.choice([1, 3]),
        "use_scalar": draw.random() < 0.3,
        "bypass_mode": draw.choice([None, False, True]),
        "use_tucker": draw.random() < 0.4,
        "dropout": draw.choice([0, 0, 0.3]),
        "rank_dropout": draw.choice([0, 0, 0.3]),
        "rank_dropout_scale": draw.random() < 0.5,
        "module_dropout": draw.choice([0, 0, 0.5]),
    }
    if algorithm in ("locon", "loha", "lokr"):
        found |= {
            "rs_lora": draw.random() < 0.2,
            "weight_decompose": draw.random() < 0.4,
            "wd_on_out": draw.random() < 0.5,
        }
    if algorithm == "lokr":
        found |= {
            "decompose_both": draw.random() < 0.5,
            "factor": draw.choice([-1, 2, 4]),
            "unbalanced_factorization": draw.random() < 0.5,
            "full_matrix": draw.random() < 0.2,
        }
    if algorithm in ("diag-oft", "boft"):
        found |= {"constraint": draw.choice([0, 0, 0.01]), "rescaled": draw.random() < 0.5}
    return found


def fill(module: nn.Module) -> None:
    """Give every parameter of an adapter a random value, so that all of them act."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # Magnitudes and factors of outputs lie around one.
            around = 1 if name.endswith(("dora_scale", "rescale")) else 0
            parameter.normal_(around, 0.3)


def step(base: nn.Module, module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None], float]:
    """Run a layer with a module before it, forward and backward, from one random state.

    Returns:
        The output, the gradients in x and in what is trained, and the number that the random state gives afterwards.
    """
    trained = [p for p in (*module.parameters(), *base.parameters()) if p.requires_grad]
    torch.manual_seed(5)
    y = base(x)
    after = torch.rand(()).item()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, list(torch.autograd.grad((y * weights).sum(), [x, *trained], allow_unused=True)), after
