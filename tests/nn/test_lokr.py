"""LoKr beyond what every method is tested for: its factors, dropout, and the differences from LyCORIS."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from peft.tuners.lokr.layer import factorization as factorization_of_peft
from safetensors.torch import save_file
from support.layer_cases import CASES, example, make, reference, with_hook
from torch import nn

import peftk
from peftk.checkpoint import CheckpointError
from peftk.checkpoint.peft import WEIGHTS_NAME
from peftk.methods import lokr
from peftk.methods._base_layer import CONVOLUTIONS
from peftk.nn import LoKrConfig, LoKrConv, LoKrLinear, layer_class_for
from peftk.nn.lokr import factorization
from peftk.testing.compare import assert_close, assert_same_bits
from peftk.testing.memory import saved_bytes

DROPPED = ["lokr", "lokr_thin", "lokr_conv", "lokr_conv_groups", "lokr_sequence_full"]


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
    axis = 1 if isinstance(layer.base_layer, CONVOLUTIONS) else -1
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
        adapter = variant.kronecker("default")
        small = 8 * 2 * sum(t.numel() for t in (lokr.first(adapter), lokr.second(adapter)))
        thin = 4 * 128 * 64 // 8 if lokr.thin(adapter) else 0
        assert saved_bytes(lambda variant=variant: variant(x), owned) <= small + thin


def test_peft_reorders_a_whole_w2_on_sequences():
    """PEFT's update of an nn.Conv1d is no Kronecker product, and files hold it: it is computed as they mean it."""
    layer = LoKrConv(nn.Conv1d(6, 4, 3), LoKrConfig(r=8, alpha=8, init_weights=False))
    w1, w2 = layer.lokr_w1["default"], layer.lokr_w2["default"]
    assert w1.shape == (2, 2)
    assert w2.shape == (2, 3, 3)
    assert_close(layer.get_delta_weight("default"), torch.kron(w1, w2).reshape(4, 6, 3), torch.float32)
    product = torch.einsum("lm,knt->lkmnt", w1, w2).reshape(4, 6, 3)
    with pytest.raises(AssertionError):
        assert_close(layer.get_delta_weight("default"), product, torch.float32)


def test_the_tucker_form_on_sequences_fails_in_peft():
    import peft

    values = {"r": 1, "use_effective_conv2d": True, "init_weights": False, "target_modules": ["0"]}
    base, x = nn.Sequential(nn.Conv1d(4, 6, 3)), torch.randn(2, 4, 9)
    with pytest.raises(RuntimeError, match="view"):
        peft.get_peft_model(copy.deepcopy(base), peft.LoKrConfig(**values))(x)
    model = peftk.get_peft_model(base, LoKrConfig(**values))
    assert_close(model(x), reference(base[0], x), torch.float32)


def test_a_transposed_convolution_is_refused_by_name():
    with pytest.raises(TypeError, match=r"'a\.b' is a .*ConvTranspose1d.*nn\.Conv2d"):
        layer_class_for(LoKrConfig(r=1), nn.ConvTranspose1d(4, 4, 3), "a.b")


@pytest.mark.parametrize("r", [100_000, 10_000_000_000])
@pytest.mark.parametrize("base", [nn.Linear(16, 16), nn.Conv2d(16, 8, 3)], ids=["linear", "conv"])
def test_a_huge_rank_asks_for_the_whole_matrices_and_costs_nothing(base, r):
    config = LoKrConfig(r=r, alpha=r, decompose_both=True, rank_pattern={"q": 2 * r}, alpha_pattern={"q": 2 * r})
    layer = layer_class_for(config, base, "p")(copy.deepcopy(base), config, module_name="p")
    assert set(_parts(layer)) == {"lokr_w1", "lokr_w2"}
    assert layer.scaling["default"] == 1
    other = layer_class_for(config, base, "q")(copy.deepcopy(base), config, module_name="q")
    assert {name: part.shape for name, part in _parts(other).items()} == {
        name: part.shape for name, part in _parts(layer).items()
    }
    with pytest.raises(ValueError, match="r: expected an int from 1 to"):
        LoKrConfig(r=2**53 + 1)


def test_a_file_of_peft_with_a_huge_rank_is_read(tmp_path):
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 16))
    config = peft.LoKrConfig(r=100_000, alpha=100_000, target_modules=["0", "1"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    x = torch.randn(3, 16)
    ours = peftk.PeftModel.from_pretrained(base, tmp_path)
    assert_close(ours(x), theirs.double()(x.double()), torch.float32)


# The sizes of the layer, the factor, then w1 and w2 as the file holds them.
ORDERS = {
    "sorted": ((16, 8), 4, (4, 2), (4, 4)),
    "sorted outputs": ((8, 16), 4, (2, 4), (4, 4)),
    "another divisor": ((32, 256), 16, (4, 16), (8, 16)),
    "unbalanced": ((32, 16), 4, (8, 4), (4, 4)),
    "unbalanced roots": ((32, 16), -1, (8, 4), (4, 4)),
    "peft": ((16, 8), 4, (4, 4), (4, 2)),
}


def _write_file(folder, tensors, **values):
    save_file({f"base_model.model.0.{name}": tensor for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)
    config = {"peft_type": "LOKR", "target_modules": ["0"], "peft_version": "0.21.0", **values}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 2)], ids=["linear", "pointwise", "conv"])
@pytest.mark.parametrize("form", ["whole", "factors", "tucker"])
@pytest.mark.parametrize("name", ORDERS)
def test_factors_in_the_order_of_lycoris_are_read(tmp_path, name, form, kernel):
    (out, features), factor, (left, middle), (rows, columns) = ORDERS[name]
    if form == "tucker" and kernel in ((), (1, 1)):
        pytest.skip("the Tucker form is one of larger kernels")
    torch.manual_seed(0)
    w1 = torch.randn(left, middle)
    if form == "whole":
        w2 = torch.randn(rows, columns, *kernel)
        tensors, r = {"lokr_w1": w1, "lokr_w2": w2}, 100_000
    elif form == "factors":
        a, b = torch.randn(rows, 1), torch.randn(1, columns * math.prod(kernel))
        w2 = (a @ b).view(rows, columns, *kernel)
        tensors, r = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, 1
    else:
        a, b, core = torch.randn(1, rows), torch.randn(1, columns), torch.randn(1, 1, *kernel)
        w2 = torch.einsum("ijhw,ik,jn->knhw", core, a, b)
        tensors, r = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}, 1
    _write_file(tmp_path, tensors, r=r, alpha=r, decompose_factor=factor, use_effective_conv2d=form == "tucker")
    layer = nn.Conv2d(features, out, kernel) if kernel else nn.Linear(features, out)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = peftk.PeftModel.from_pretrained(nn.Sequential(layer), tmp_path)
    assert [str(w.message).split(" gives")[0] for w in seen] == (
        [] if name == "peft" else [f"{tmp_path / 'adapter_config.json'}: decompose_factor: {factor}"]
    )
    w1, w2 = w1.double(), w2.double().view(rows, columns, -1)
    want = torch.einsum("lm,knt->lkmnt", w1, w2).reshape(out, features, *kernel)
    assert_close(model.get_base_model()[0].get_delta_weight("default"), want, torch.float32)

    # What is saved can be read again, and the same configuration makes the same shapes.
    model.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peftk.PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(layer)), tmp_path / "again")
    assert_same_bits(
        again.get_base_model()[0].get_delta_weight("default"), model.get_base_model()[0].get_delta_weight("default")
    )


def test_factors_that_nobody_makes_of_the_configuration_are_refused(tmp_path):
    _write_file(
        tmp_path,
        {"lokr_w1": torch.zeros(16, 1), "lokr_w2": torch.zeros(1, 8)},
        r=100,
        alpha=100,
        decompose_factor=4,
    )
    with pytest.raises(CheckpointError, match="lokr_w1"):
        peftk.PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 16)), tmp_path)


def _parts(layer):
    return {name: getattr(layer, name)["default"] for name in layer.adapter_layer_names if getattr(layer, name)}
