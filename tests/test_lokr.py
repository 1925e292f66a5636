"""LoKr beyond what every method is tested for: its factors, dropout, and the differences from LyCORIS."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from layer_cases import CASES, example, make, with_hook
from peft.tuners.lokr.layer import factorization as factorization_of_peft
from torch import nn

from peftk.nn import LoKrConfig, LoKrLinear
from peftk.nn.lokr import factorization
from peftk.testing.compare import assert_close, assert_same_bits
from peftk.testing.memory import saved_bytes

DROPPED = ["lokr", "lokr_thin", "lokr_conv", "lokr_conv_groups"]


def test_sizes_are_factorized_as_peft_does():
    for size in (*range(1, 70), 127, 128, 384, 4096, 11008):
        for factor in (-1, 1, 2, 4, 5, 8, 32, 64, 100):
            assert factorization(size, factor) == factorization_of_peft(size, factor), (size, factor)


def test_a_factor_that_does_not_divide_is_told():
    config = LoKrConfig(r=1, decompose_factor=4)
    with pytest.warns(UserWarning, match=r"decompose_factor: 4 does not divide the size 9 of module 'q'; 3 is used"):
        layer = LoKrLinear(nn.Linear(9, 8), config, module_name="q")
    assert layer.lokr_w1["default"].shape == (4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoKrLinear(nn.Linear(8, 8), config)
        LoKrLinear(nn.Linear(9, 7), LoKrConfig(r=1))


@pytest.mark.parametrize("name", DROPPED)
def test_rank_dropout_drops_rows_of_the_update(name):
    layer = make(CASES[name])
    x = example(CASES[name])
    with torch.no_grad():
        base, full = layer.base_layer(x), layer(x)
    axis = 1 if layer.kind == "Conv2d" else -1
    for scaled in (False, True):
        layer.rank_dropout["default"], layer.rank_dropout_scale["default"] = 0.5, scaled
        torch.manual_seed(3)
        kept = torch.rand(1) > 0, torch.rand(layer.out_features) > 0.5
        torch.manual_seed(3)
        y = layer(x)
        share = kept[1].double().mean().item() if scaled else 1.0
        rows = kept[1].view(-1, *[1] * (x.dim() - 2)) if axis == 1 else kept[1]
        expected = torch.where(rows, base.double() + (full.double() - base.double()) / share, base.double())
        assert_close(y, expected, torch.float32)
        layer.eval()
        assert_same_bits(layer(x), full)
        layer.train()


@pytest.mark.parametrize("name", DROPPED)
def test_module_dropout_drops_the_whole_update(name):
    layer = make(CASES[name])
    x = example(CASES[name])
    base, full = layer.base_layer(x), layer(x)
    layer.module_dropout["default"] = 0.5
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        y = layer(x)
        which = torch.allclose(y, full, atol=1e-5)
        assert which or torch.allclose(y, base, atol=1e-5)
        seen.add(which)
    assert seen == {True, False}


def test_nothing_kept_changes_nothing():
    layer = make(LoKrConfig(r=1, rank_dropout=0.999999, rank_dropout_scale=True, init_weights=False))
    x = example(CASES["lokr"])
    assert_same_bits(layer(x), layer.base_layer(x))


def test_the_scale_holds_where_no_factor_has_a_rank():
    """LyCORIS takes 1 there, PEFT alpha / r."""
    layer = make(LoKrConfig(r=8, alpha=2, init_weights=False))
    assert set(layer.state_dict()) >= {"lokr_w1.default", "lokr_w2.default"}
    product = torch.kron(layer.lokr_w1["default"], layer.lokr_w2["default"])
    assert_close(layer.get_delta_weight("default"), (2 / 8 * product).double(), torch.float32)


@pytest.mark.parametrize("name", ["lokr", "lokr_full", "lokr_both", "lokr_thin"])
def test_only_x_and_what_is_smaller_is_saved(name):
    layer = make(CASES[name], features=(64, 48))
    x = torch.randn(128, 64)
    owned = [x, *layer.parameters()]
    for variant in (layer, with_hook(copy.deepcopy(layer))):
        owned = [x, *variant.parameters()]
        small = 8 * 2 * sum(t.numel() for t in (variant._w1("default"), variant._w2("default")))
        thin = 4 * 128 * 64 // 8 if variant._thin("default") else 0
        assert saved_bytes(lambda variant=variant: variant(x), owned) <= small + thin


def test_a_convolution_of_one_dimension_is_refused_by_name():
    from peftk.nn import layer_class_for

    with pytest.raises(TypeError, match=r"'a\.b' is a .*Conv1d.*nn\.Conv2d"):
        layer_class_for(LoKrConfig(r=1), nn.Conv1d(4, 4, 3), "a.b")
