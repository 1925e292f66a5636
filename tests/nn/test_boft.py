"""BOFT beyond what every layer is tested for: more than one factor against PEFT's own parts, large groups, files."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from peft.tuners.boft.layer import Linear as TheirLinear
from safetensors.torch import load_file, save_file
from support.layer_cases.boft import rotation
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftk
from peftk import BOFTConfig, PeftModel, get_peft_model
from peftk.nn import BOFTConv2d, BOFTLinear
from peftk.nn.boft import MAX_FACTORS
from peftk.testing.compare import assert_close, assert_same_bits
from peftk.testing.memory import saved_bytes


def config(size=4, factors=2, **values):
    return BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, init_weights=False, **values)


def layer(features=(32, 24), seed=0, bias=True, **values):
    torch.manual_seed(seed)
    return BOFTLinear(nn.Linear(*features, bias=bias), config(**values))


def their_rotation(generators: torch.Tensor) -> torch.Tensor:
    """PEFT's dense rotation, from its own Cayley transform and permutations; only its CUDA extension is left out."""
    stages, count, size, _ = generators.shape
    part = TheirLinear.__new__(TheirLinear)
    nn.Module.__init__(part)
    features, product = count * size, None
    blocks = part.cayley_batch(generators.view(-1, size, size)).view(generators.shape)
    for stage in range(stages):
        order = part.block_butterfly_perm(features, int(count / 2**stage), int(size / 2), stages - 1)
        permutation = part.perm2mat(order).to(blocks.dtype)
        factor = permutation @ torch.block_diag(*blocks[stage]) @ permutation.T
        product = factor if product is None else factor @ product
    return product


@pytest.mark.parametrize(("features", "size", "factors"), [(32, 4, 2), (32, 2, 4), (48, 6, 3), (24, 8, 1)])
def test_several_factors_are_those_of_peft(features, size, factors):
    adapted = layer((features, 20), size=size, factors=factors)
    generators, scale = adapted.boft_R["default"].detach().double(), adapted.boft_s["default"].detach().double()
    theirs = their_rotation(generators)
    assert_close(theirs, rotation(generators), torch.float32)
    dense, found_scale = adapted.get_delta_weight("default")
    assert_close(dense, theirs, torch.float32)
    assert torch.equal(found_scale.double(), scale)
    x, base = torch.randn(7, features), adapted.base_layer
    weight = (theirs @ base.weight.double().T).T * scale
    assert_close(adapted(x), nn.functional.linear(x.double(), weight, base.bias.double()), torch.float32)


def test_several_adapters_rotate_and_merge_as_in_peft():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = {"target_modules": ["0"], "init_weights": False}
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.BOFTConfig(boft_block_size=8, **values))
        theirs.add_adapter("other", peft.BOFTConfig(boft_block_size=8, **values))
    theirs.base_model.set_adapter(["default", "other"])
    ours = get_peft_model(copy.deepcopy(base), BOFTConfig(boft_block_size=8, target_modules=["0"]))
    ours.add_adapter("other", BOFTConfig(boft_block_size=8, target_modules=["0"]))
    ours.base_model.set_adapter(["default", "other"])
    state = {n: p for n, p in theirs.named_parameters() if "boft" in n}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name in state:
                parameter.copy_(state[name])
    x = torch.randn(5, 16)
    assert_close(ours(x), theirs(x).double(), torch.float32)
    mine, other = ours.base_model.model[0], theirs.base_model.model[0]
    mine.merge()
    other.merge()
    assert_close(mine.base_layer.weight, other.base_layer.weight.double(), torch.float32)


def test_every_adapter_keeps_its_own_blocks_and_factors():
    """PEFT has one permutation a layer, which the newest adapter overwrites."""
    adapted = layer(factors=3)
    x = torch.randn(3, 32)
    before = adapted(x)
    adapted.add_adapter("other", config(8, 1))
    assert_same_bits(adapted(x), before)
    adapted.set_adapter("other")
    assert adapted.boft_R["other"].shape == (1, 4, 8, 8)
    dense = rotation(adapted.boft_R["other"].double())
    weight = adapted.boft_s["other"].double() * (adapted.base_layer.weight.double() @ dense.T)
    assert_close(adapted(x), nn.functional.linear(x.double(), weight, adapted.bias.double()), torch.float32)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_group_of_a_thousand_features(kind):
    torch.manual_seed(0)
    if kind == "linear":
        adapted, x = BOFTLinear(nn.Linear(1024, 8), config(4, 9)), torch.randn(3, 1024)
    else:
        adapted, x = BOFTConv2d(nn.Conv2d(256, 8, 2), config(4, 9)), torch.randn(1, 256, 3, 3)
    y = adapted(x)
    y.sum().backward()
    assert adapted.boft_R["default"].grad.abs().sum() > 0
    adapted.merge()
    assert_close(adapted(x), y.detach().double(), torch.float32)


def test_dropout_makes_blocks_of_one_factor_the_identity_and_replays():
    adapted = layer((64, 24), size=4, factors=2, boft_dropout=0.5)
    eye = torch.eye(4)
    torch.manual_seed(3)
    untouched = [int((f == eye).all((1, 2)).sum()) for f in adapted.butterfly("default").factors]
    assert sorted(untouched) == [0, 8]
    chosen = {int((adapted.butterfly("default").factors[0] == eye).all((1, 2)).any()) for _ in range(20)}
    assert chosen == {0, 1}
    x = torch.randn(3, 64, requires_grad=True)
    torch.manual_seed(5)
    y = checkpoint(adapted, x, use_reentrant=False)
    (y * y).sum().backward()
    replayed = adapted.boft_R["default"].grad.clone()
    adapted.zero_grad()
    torch.manual_seed(5)
    z = adapted(x)
    (z * z).sum().backward()
    assert_same_bits(y, z)
    assert_same_bits(adapted.boft_R["default"].grad, replayed)
    adapted.eval()
    torch.manual_seed(5)
    assert_same_bits(adapted(x), adapted(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_the_unscaled_output_and_parameters(dtype):
    torch.manual_seed(0)
    adapted = BOFTLinear(nn.Linear(64, 48, dtype=dtype), config(4, 2))
    x = torch.randn(100, 64, dtype=dtype, requires_grad=True)
    parameters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    # Triangles, Cayley blocks and composed blocks, all of the size of the parameters.
    limit = 100 * 48 * x.element_size() + 4 * 4 * parameters
    assert saved_bytes(lambda: adapted(x), [x, *adapted.parameters()]) <= limit


def test_compiles_in_one_graph():
    adapted = layer(factors=2, boft_dropout=0.0)
    x = torch.randn(3, 32)
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), adapted(x).double(), torch.float32)


@pytest.mark.parametrize(
    ("values", "features", "message"),
    [
        (
            {"size": 5},
            12,
            r"boft_block_size: 5 does not fit the input size 12 of module .m. .*values that do: \[2, 6\]",
        ),
        ({"size": 3, "factors": 1}, 10, r"divides it; values that do: \[1, 2, 5, 10\]"),
        ({"size": 4, "factors": 4}, 36, "no value does; the largest boft_n_butterfly_factor for this input is 2"),
        ({"size": 0, "boft_block_num": 5}, 24, r"boft_block_num: 5 does not fit .*values that do: \[2, 4, 6, 12\]"),
    ],
)
def test_blocks_that_do_not_fit_are_named_with_those_that_would(values, features, message):
    with pytest.raises(ValueError, match=message):
        BOFTLinear(nn.Linear(features, 4), config(**values), module_name="m")


@pytest.mark.parametrize(
    ("values", "error", "name"),
    [
        ({"boft_block_size": 0}, ValueError, "boft_block_size, boft_block_num"),
        ({"boft_block_num": 4}, ValueError, "boft_block_size, boft_block_num"),
        ({"boft_block_size": -1}, ValueError, "boft_block_size"),
        ({"boft_n_butterfly_factor": 0}, ValueError, "boft_n_butterfly_factor"),
        ({"boft_n_butterfly_factor": MAX_FACTORS + 1}, ValueError, "boft_n_butterfly_factor"),
        ({"boft_n_butterfly_factor": 1.0}, TypeError, "boft_n_butterfly_factor"),
        ({"boft_dropout": 1.0}, ValueError, "boft_dropout"),
        ({"bias": "oft_only"}, ValueError, "bias"),
        ({"init_weights": "yes"}, TypeError, "init_weights"),
    ],
)
def test_bad_fields_are_named(values, error, name):
    with pytest.raises(error, match=f"^{name}:"):
        BOFTConfig(**values)


def test_the_fields_and_defaults_are_those_of_peft():
    ours, theirs = BOFTConfig().to_dict(), peft.BOFTConfig().to_dict()
    assert {k: v for k, v in theirs.items() if ours.get(k) != v and k != "peft_version"} == {}


def test_convolutions_with_groups_are_refused_by_name():
    with pytest.raises(ValueError, match="'m' is a convolution with groups=2; BOFT"):
        BOFTConv2d(nn.Conv2d(8, 8, 3, groups=2), config(2, 1), module_name="m")


def test_convolutions_keep_their_geometry():
    """D14: PEFT ignores the dilation, so that its adapted layer is another one than the merged layer."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2, padding=2))
    x = torch.randn(1, 4, 7, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.BOFTConfig(target_modules=["0"]))
    assert theirs(x).shape != base(x).shape
    ours = get_peft_model(copy.deepcopy(base), BOFTConfig(target_modules=["0"]))
    assert_same_bits(ours(x), base(x))


def test_a_file_with_fewer_factors_than_its_configuration_says(tmp_path):
    """D8: PEFT without its extension computes one factor, and keeps the number that was asked for in the file."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = peft.BOFTConfig(boft_n_butterfly_factor=2, target_modules=["0"], init_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(base), asked)
    theirs.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 2
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.0.boft_R"].shape[0] == 1
    with pytest.warns(UserWarning, match="boft_n_butterfly_factor: .* says 2, but its tensors hold 1") as caught:
        ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert len([w for w in caught if "boft_n_butterfly_factor" in str(w.message)]) == 1
    assert ours.peft_config["default"].boft_n_butterfly_factor == 1
    x = torch.randn(3, 16)
    assert_close(ours(x), theirs.eval()(x).double(), torch.float32)
    # More factors than the configuration says, or numbers that differ, are an error of the file.
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v.repeat(3, 1, 1, 1) if "boft_R" in k else v for k, v in tensors.items()}, str(tmp_path / "x"))
    (tmp_path / "x").replace(tmp_path / "adapter_model.safetensors")
    with pytest.raises(peftk.checkpoint.CheckpointError, match="shape expected"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_files_with_several_factors_come_back(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8))
    model = get_peft_model(copy.deepcopy(base), config(2, 2, target_modules=["0", "1"], bias="boft_only"))
    model.save_pretrained(tmp_path)
    assert "base_model.model.1.base_layer.bias" in load_file(tmp_path / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(3, 16)
    assert_same_bits(loaded(x), model.eval()(x))
