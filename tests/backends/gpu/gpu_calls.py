"""Calls and layers that the GPU tests share."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk.runtime import registry
from peftk.testing.calls import KINDS, Call

BACKENDS = ("native", "triton")
# Sizes that no tile divides, and enough rows for a reduction to be split.
TOKENS, FEATURES, OUT = 2053, 768, 520
SIZES = {"block": (8, 32, 256), "rank": (16, 64), "factor": (4, 8), "cayley": (8, 32, 64)}


def calls() -> list[Call]:
    """Return calls of every operator, forward and backward."""
    found = []
    for operator in registry.OPERATORS:
        forward = operator.removesuffix("_backward")
        kind = KINDS[forward]
        for size in SIZES.get(forward, SIZES[kind.size]):
            if not kind.fits(FEATURES, OUT, size):
                continue
            for dtype, variant in itertools.product(kind.dtypes, kind.variants):
                found.append(Call(operator, TOKENS, FEATURES, OUT, size, dtype, variant))
    return found


def require(call: Call, backend: str, arguments: tuple) -> None:
    """Skip a test with the predicate's reason."""
    if reason := call.reason(backend, arguments):
        pytest.skip(f"{backend}: {reason}")


def as_tuple(results: Tensor | tuple) -> tuple[Tensor, ...]:
    """Return the results of an operator as a tuple."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


METHODS = {
    "lora": peftk.LoraConfig(r=16, init_lora_weights=False),
    "oft-neumann": peftk.OFTConfig(oft_block_size=32, init_weights=False),
    "oft-exact": peftk.OFTConfig(oft_block_size=32, use_cayley_neumann=False, init_weights=False),
}
FRESH = {
    "lora": peftk.LoraConfig(r=16),
    "oft-neumann": peftk.OFTConfig(oft_block_size=32),
    "oft-exact": peftk.OFTConfig(oft_block_size=32, use_cayley_neumann=False),
}


def layer(config: object, dtype: torch.dtype, device: str, features: int = 512, out: int = 384) -> nn.Module:
    """Return an adapted layer; equal arguments give equal values."""
    torch.manual_seed(0)
    base = nn.Linear(features, out, device=device, dtype=dtype)
    kind = peftk.nn.LoRALinear if isinstance(config, peftk.LoraConfig) else peftk.nn.OFTLinear
    made = kind(base, config)
    if isinstance(config, peftk.OFTConfig) and not config.init_weights:
        # Small enough for the series to converge.
        made.oft_R["default"].weight.data.mul_(0.2)
    return made


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the adapter."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
