"""LyCORIS's modules and networks under `peftk.accelerate`, beside the same as LyCORIS has them."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftk
from benchmarks.arms import Arm, Budget, compare
from peftk.testing.compare import LIMITS

from . import truth

F32 = torch.float32
FEW = Budget(seconds=20.0, least=11, most=30, slow=2.0, least_slow=5, longest=60.0)

ALGORITHMS: dict[str, dict[str, Any]] = {
    "LoRA": {"algo": "locon"},
    "DoRA": {"algo": "locon", "dora_wd": True},
    "LoHa": {"algo": "loha"},
    "LoKr": {"algo": "lokr", "factor": 16},
    "diag-OFT": {"algo": "diag-oft"},
    "BOFT": {"algo": "boft"},
}
"""Options of `create_lycoris` by the method's name."""

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear 1024": (lambda: nn.Linear(1024, 1024), (512, 1024)),
    "linear 4096": (lambda: nn.Linear(4096, 4096), (256, 4096)),
    "convolution 320": (lambda: nn.Conv2d(320, 320, 3, padding=1), (1, 320, 32, 32)),
}
"""Layers and the shapes of their inputs."""


def _block() -> nn.Module:
    """A block of a UNet of Stable Diffusion: two residual layers with attention to a text behind each."""
    from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = CrossAttnDownBlock2D(
                in_channels=320,
                out_channels=320,
                temb_channels=1280,
                num_layers=2,
                num_attention_heads=8,
                cross_attention_dim=768,
            )
            generator = torch.Generator().manual_seed(1)
            self.time = torch.randn(1, 1280, generator=generator)
            self.text = torch.randn(1, 77, 768, generator=generator)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, temb=self.time, encoder_hidden_states=self.text)[0]

    return Block()


class Run:
    """A network before a model, as LyCORIS has it or accelerated.

    Args:
        name: The arm.
        model: The model, which becomes this run's own.
        options: Those of `create_lycoris`.
        x: The input.
        reference: The output that is expected; None for the arm that gives it.
        trains: Whether a step is a forward and a backward pass, or a forward pass that records nothing.
    """

    def __init__(
        self, name: str, model: nn.Module, options: dict[str, Any], x: Tensor, reference: Tensor | None, trains: bool
    ) -> None:
        import lycoris

        self.model, self.x, self.reference, self.trains = model, x, reference, trains
        torch.manual_seed(2)
        # The size of a butterfly's blocks times a power of two must be the number of channels.
        size = {"diag-oft": 32, "boft": 40}.get(options["algo"], 16)
        self.network = lycoris.create_lycoris(model.requires_grad_(False), 1.0, size, size, conv_dim=size, **options)
        with torch.no_grad():
            for module in self.network.loras:
                for parameter in module.parameters():
                    parameter.add_(torch.randn(parameter.shape), alpha=0.01)
        self.network.apply_to()
        self.network.train(trains)
        if name == "accelerated":
            peftk.accelerate(self.network, strict=True)
        self.arm = Arm(name, self.step, self.check, 100 * LIMITS[F32], lambda: [x, *model.parameters()])

    def step(self) -> Tensor:
        """Run forward, and backward if it trains."""
        if not self.trains:
            with torch.no_grad():
                return self.model(self.x)
        self.network.zero_grad()
        y = self.model(self.x)
        y.backward(torch.ones_like(y))
        return y

    def check(self) -> dict[str, float]:
        """Return how far the output is from that of the first run, relative to it."""
        y = self.step().detach()
        return truth.errors({"output": y}, {"output": (y if self.reference is None else self.reference).double()})


def _compare(benchmark: Any, budget: Budget, method: str, model: nn.Module, x: Tensor, what: str, trains: bool) -> None:
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    benchmark.group = f"lycoris {method} {what}"
    options = ALGORITHMS[method]
    reference = Run("lycoris", copy.deepcopy(model), options, x, None, trains).step().detach().clone()
    arms = [Run(name, copy.deepcopy(model), options, x, reference, trains).arm for name in ("accelerated", "lycoris")]
    info = {
        "suite": "lycoris",
        "cell": f"{method}, {what}, fp32",
        "method": method,
        "mode": "forward+backward" if trains else "forward",
        "tokens": x.shape[0] if x.dim() == 2 else x[0, 0].numel(),
        "in_features": x.shape[1],
        "out_features": x.shape[1],
        "size": 16,
        "dtype": "float32",
        "parameters": "float32",
    }
    compare(benchmark, arms, "lycoris", info, FEW if budget.least > 3 else budget)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", ALGORITHMS)
def test_layer(method: str, layer: str, benchmark, budget: Budget) -> None:
    pytest.importorskip("lycoris")
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    _compare(benchmark, budget, method, make(), torch.randn(shape, requires_grad=True), layer, True)


@pytest.mark.full_run
@pytest.mark.parametrize("trains", [True, False], ids=["step", "inference"])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_block(method: str, trains: bool, benchmark, budget: Budget) -> None:
    pytest.importorskip("lycoris")
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    what = "UNet block, step" if trains else "UNet block, inference"
    _compare(benchmark, budget, method, _block(), torch.randn(1, 320, 16, 16, requires_grad=trains), what, trains)
