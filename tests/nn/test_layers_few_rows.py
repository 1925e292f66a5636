"""Layers on few rows that record nothing take a way of their own, which gives what the recorded one gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import peftk
from peftk.testing.compare import assert_close, assert_same_bits

OUT, FEATURES = 36, 84
DTYPES = [torch.float32, torch.bfloat16]
CONFIGS = {
    "lora": lambda: peftk.LoraConfig(r=5),
    "dora": lambda: peftk.LoraConfig(r=5, use_dora=True),
    "c3a": lambda: peftk.C3AConfig(block_size=12),
    "c3a-odd": lambda: peftk.C3AConfig(block_size=3),
    "loha": lambda: peftk.LoHaConfig(r=3),
    "loha-large": lambda: peftk.LoHaConfig(r=30),
    "lokr": lambda: peftk.LoKrConfig(r=99, decompose_factor=4),
    "lokr-thin": lambda: peftk.LoKrConfig(r=2, decompose_factor=2),
    "oft": lambda: peftk.OFTConfig(oft_block_size=4, r=0),
}


def made(config: Callable[[], peftk.PeftConfig], dtype: torch.dtype, spread: float = 0.3) -> nn.Module:
    torch.manual_seed(4)
    base = nn.Linear(FEATURES, OUT).to(dtype)
    layer = peftk.nn.layer_class_for(config(), base)(base, config()).eval()
    for name, p in layer.named_parameters():
        if spread and not name.startswith("base_layer") and "magnitude" not in name:
            nn.init.normal_(p, std=spread)
    return layer


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_matches_float64(config: Callable, dtype: torch.dtype, rows: int) -> None:
    layer, x = made(config, dtype), torch.randn(2, rows, FEATURES).to(dtype)[:1]
    with torch.no_grad():
        found, again = layer(x), layer(x)
        exact = made(config, dtype).double()
        truth = exact(x.double())
    assert found.dtype is dtype
    assert_close(found, truth, dtype)
    assert_close(again, truth, dtype)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_fresh_adapter_keeps_the_bits_of_the_frozen_layer(config: Callable, dtype: torch.dtype, rows: int) -> None:
    layer, x = made(config, dtype, spread=0.0), torch.randn(rows, FEATURES).to(dtype)
    if isinstance(layer, peftk.nn.C3ALinear):
        layer.c3a_kernel["default"].data.zero_()
    with torch.no_grad():
        assert_same_bits(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_row_that_is_not_finite_changes_no_other(config: Callable) -> None:
    layer, x = made(config, torch.float32), torch.randn(4, FEATURES)
    marred = x.clone()
    marred[2, 7] = torch.nan
    kept = torch.tensor([0, 1, 3])
    with torch.no_grad():
        layer(x)
        clean, found = layer(x), layer(marred)
    assert found[2].isnan().any()
    assert_same_bits(found[kept], clean[kept])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_writes_to_parameters_are_followed(config: Callable) -> None:
    layer, x = made(config, torch.float32), torch.randn(1, FEATURES)
    for name, parameter in layer.named_parameters():
        with torch.no_grad():
            before = layer(x)
            parameter.data.view(-1)[3:5].add_(0.5)
            after = layer(x)
        assert not torch.equal(before, after), name
        assert_close(after, layer(x).detach().double(), torch.float32)
