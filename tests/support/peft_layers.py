"""Models of Hugging Face PEFT with one layer of each kind, and random configurations for them."""

from __future__ import annotations

import random
from typing import Any

import peft
import torch
from peft.tuners.adalora import layer as adalora
from torch import Tensor, nn

ROWS = 96
"""More than the few that LoRA leaves to PEFT."""


class Kinds(nn.Module):
    """An embedding, two linear layers and convolutions of every kind, one after the other."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width, bias=False)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 4, 1, bias=False)
        self.sequence = nn.Conv1d(4, 6, 3, padding=1)
        self.volume = nn.Conv3d(6, 4, (1, 3, 2), padding=(0, 1, 1))

    def forward(self, indices: Tensor, x: Tensor) -> Tensor:
        rows = self.embedding(indices) + x
        rows = self.second(torch.tanh(self.first(rows)))
        image = rows.reshape(-1, 4, 8, 8)
        image = torch.tanh(self.pointwise(torch.tanh(self.conv(image))))
        sequence = torch.tanh(self.sequence(image.flatten(2)))
        return self.volume(sequence.unflatten(2, (4, 4, 4)))


LINEAR = ["first", "second"]
CONV = ["conv", "pointwise"]
EVERY_CONV = [*CONV, "sequence", "volume"]
# Older versions of PEFT have AdaLoRA on linear layers alone.
ADALORA_CONV = CONV if hasattr(adalora, "SVDConv2d") else []


def _lora(draw: random.Random) -> peft.PeftConfig:
    dora = draw.random() < 0.4
    bias = not dora and draw.random() < 0.2
    return peft.LoraConfig(
        r=draw.choice([1, 2, 5]),
        lora_alpha=draw.choice([1, 7]),
        lora_dropout=draw.choice([0.0, 0.3]),
        use_rslora=draw.random() < 0.3,
        use_dora=dora,
        lora_bias=bias,
        # PEFT refuses a bias on embeddings.
        target_modules=["first", "conv", "sequence"]
        if bias
        else draw.choice([LINEAR, EVERY_CONV, ["embedding", *LINEAR], LINEAR + EVERY_CONV]),
    )


def _adalora(draw: random.Random) -> peft.PeftConfig:
    return peft.AdaLoraConfig(
        init_r=draw.choice([1, 4]),
        target_r=1,
        total_step=10,
        lora_dropout=draw.choice([0.0, 0.3]),
        target_modules=LINEAR + draw.choice([[], ADALORA_CONV]),
    )


def _lycoris(kind: Any, draw: random.Random, **options: Any) -> peft.PeftConfig:
    return kind(
        r=draw.choice([1, 2, 4]),
        alpha=draw.choice([1, 3]),
        rank_dropout=draw.choice([0.0, 0.2]),
        module_dropout=draw.choice([0.0, 0.3]),
        use_effective_conv2d=draw.random() < 0.5,
        target_modules=draw.choice([LINEAR, [*CONV, "sequence"], [*LINEAR, *CONV, "sequence"]]),
        **options,
    )


def _loha(draw: random.Random) -> peft.PeftConfig:
    return _lycoris(peft.LoHaConfig, draw)


def _lokr(draw: random.Random) -> peft.PeftConfig:
    options = {
        "decompose_both": draw.random() < 0.5,
        "decompose_factor": draw.choice([-1, 2, 4]),
        "rank_dropout_scale": draw.random() < 0.5,
    }
    config = _lycoris(peft.LoKrConfig, draw, **options)
    # PEFT fails there, wherever w1 is more than a number.
    config.use_effective_conv2d = config.use_effective_conv2d and "sequence" not in config.target_modules
    return config


def _oft(draw: random.Random) -> peft.PeftConfig:
    return peft.OFTConfig(
        r=0,
        oft_block_size=draw.choice([2, 4]),
        block_share=draw.random() < 0.3,
        coft=draw.random() < 0.2,
        use_cayley_neumann=draw.random() < 0.6,
        num_cayley_neumann_terms=draw.choice([2, 3, 4, 5, 7]),
        target_modules=draw.choice([LINEAR, ["pointwise"], [*LINEAR, "conv"]]),
    )


def _boft(draw: random.Random) -> peft.PeftConfig:
    return peft.BOFTConfig(
        boft_block_size=draw.choice([2, 4]),
        boft_dropout=draw.choice([0.0, 0.3]),
        target_modules=draw.choice([LINEAR, CONV, LINEAR + CONV]),
    )


def _c3a(draw: random.Random) -> peft.PeftConfig:
    return peft.C3AConfig(block_size=draw.choice([2, 4, 8]), target_modules=["first", "second"])


METHODS = {
    "lora": _lora,
    "adalora": _adalora,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
    "boft": _boft,
    "c3a": _c3a,
}


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter of an adapter a random value, so that all of them act."""
    generator = torch.Generator().manual_seed(seed)
    marks = ("lora_", "hada_", "lokr_", "oft_", "boft_", "c3a_")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(mark in name for mark in marks):
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise + (1 if "boft_s" in name or "magnitude" in name else 0))
    return model


def adapted(method: str, seed: int = 0, width: int = 16, **options: Any) -> nn.Module:
    """Return a PEFT model with a random configuration of a method, filled."""
    torch.manual_seed(seed)
    config = METHODS[method](random.Random(seed))
    for name, value in options.items():
        setattr(config, name, value)
    return fill(peft.get_peft_model(Kinds(width), config), seed)


def inputs(dtype: torch.dtype = torch.float32, width: int = 16) -> tuple[Tensor, Tensor]:
    """Return the arguments of `Kinds`."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, width, generator=generator).to(dtype)
    return torch.randint(0, 20, (ROWS,), generator=generator), x.requires_grad_()


def step(model: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor], float]:
    """Run a model forward and backward from one random state.

    Returns:
        The output, the gradients by name, and the number that the random state gives afterwards.
    """
    model.zero_grad()
    args[1].grad = None
    torch.manual_seed(11)
    y = model(*args)
    after = torch.rand(()).item()
    y.backward(torch.sin(torch.arange(y.numel(), dtype=torch.float32)).view_as(y).to(y.dtype))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {"input": args[1].grad.clone(), **found}, after


def error(got: Tensor, expected: Tensor) -> float:
    """Return the size of a difference beside that of what was expected."""
    difference = (got.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-6)).item()
