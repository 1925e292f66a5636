"""Adapter files that LyCORIS, kohya's scripts and diffusers write: outputs are theirs, or the file is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.foreign_files import COMBINATIONS, FORMS, LAYERS, X, by_lycoris, net
from torch import Tensor, nn

import peftk
from peftk.checkpoint.container import CheckpointError
from peftk.testing.compare import assert_close

# What a file means, and no layer of this package or of PEFT can say.
REFUSED = {
    ("lokr, whole", "sequence"): "lokr_w2",
    ("lokr, both", "sequence"): "lokr_w2",
}

# Layers that are too small for a first factor of a rank of its own.
EXEMPT = {"lokr, both": ("conv", "sequence", "volume")}


@pytest.mark.parametrize("prefix", ["lycoris", "lora_unet"])
@pytest.mark.parametrize(("form", "layers"), COMBINATIONS)
def test_files_of_lycoris(form: str, layers: str, prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    expected = by_lycoris(path, LAYERS[layers], prefix, **FORMS[form])
    before = net()(X)
    # LyCORIS ignores options that it does not know, so the file says whether they acted.
    keys = load_file(path).keys()
    for option, part in (("dora", "dora_scale"), ("resc", "rescale"), ("both", "lokr_w1_a"), ("whole", "lokr_w2")):
        assert option not in form or layers in EXEMPT.get(form, ()) or any(key.endswith(part) for key in keys)
    if "rslora" in form:
        assert {tensor.item() for key, tensor in load_file(path).items() if key.endswith("alpha")} == {4.0}
    if (form, layers) in REFUSED and any(key.rpartition(".")[2] == "lokr_w2" for key in load_file(path)):
        with pytest.raises(CheckpointError, match=REFUSED[form, layers]):
            peftk.PeftModel.from_pretrained(net(), path)
        return
    model = peftk.PeftModel.from_pretrained(net(), path)
    assert_close(model(X), expected.double(), torch.float32)
    assert (before - expected).abs().max() > 1e-3
    # As a further adapter, and written by PEFT's rules, it is the same.
    other = peftk.get_peft_model(net(), peftk.LoraConfig(r=2, target_modules=["first"]))
    if type(model.peft_config["default"]) is peftk.LoraConfig:
        other.load_adapter(path, "published")
        other.set_adapter("published")
        assert torch.equal(other.eval()(X), model(X))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(peftk.PeftModel.from_pretrained(net(), tmp_path / "saved")(X), model(X))


def kohya(path: Path, alpha: float | None = 2.0, dtype: torch.dtype = torch.float32, **more: Tensor) -> Tensor:
    """Write a file as kohya's scripts do, with the text encoder's modules beside, and return the output."""
    torch.manual_seed(2)
    model, tensors = net(), {}
    for name, rank in (("first", 3), ("block.conv_in", 2)):
        layer = model.get_submodule(name)
        taps = layer.weight.shape[2:]
        down = torch.randn(rank, layer.weight.shape[1], *taps).to(dtype)
        up = torch.randn(layer.weight.shape[0], rank, *[1] * len(taps)).to(dtype)
        key = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
        update = (up.float().flatten(1) @ down.float().flatten(1)).view(layer.weight.shape)
        layer.weight.data += (1.0 if alpha is None else alpha / rank) * update
    tensors |= {"lora_te_text_model_fc1.lora_down.weight": torch.ones(2, 4)}
    tensors |= {"lora_te_text_model_fc1.lora_up.weight": torch.ones(4, 2), **more}
    save_file(tensors, path, {"ss_network_module": "networks.lora"})
    return model(X).detach()


@pytest.mark.parametrize("alpha", [2.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_kohya(dtype: torch.dtype, alpha: float | None, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    expected = kohya(path, alpha, dtype)
    with pytest.warns(UserWarning, match="1 that begin with 'lora_te_' are not in this model and were left out"):
        model = peftk.PeftModel.from_pretrained(net(), path)
    assert_close(model(X), expected.double(), torch.float32)
    config = model.peft_config["default"]
    assert {config.r, *config.rank_pattern.values()} == {2, 3}


def test_a_dialect_that_is_asked_for_is_demanded(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    expected = by_lycoris(path, LAYERS["linear"], **FORMS["diag-oft"])
    for dialect in ("auto", "lycoris", "kohya"):
        model = peftk.PeftModel.from_pretrained(net(), path, dialect=dialect)
        assert_close(model(X), expected.double(), torch.float32)
    for dialect, message in (("diffusers", "dialect: expected diffusers"), ("peft", "dialect: expected PEFT")):
        with pytest.raises(CheckpointError, match=message):
            model.load_adapter(path, "other", dialect=dialect)
    with pytest.raises(ValueError, match=r"dialect: expected one of .*'auto'.* got 'webui'"):
        peftk.PeftModel.from_pretrained(net(), path, dialect="webui")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(peftk.PeftModel.from_pretrained(net(), tmp_path / "saved", dialect="peft")(X), model(X))
    with pytest.raises(ValueError, match=r"dialect: expected 'auto' or 'peft' for what is no file, got 'kohya'"):
        peftk.PeftModel.from_pretrained(net(), tmp_path / "saved", dialect="kohya")
    save_file({"diffusion_model.first.oft_blocks": torch.zeros(4, 4, 4)}, path)
    with pytest.raises(CheckpointError, match="ComfyUI bounds rotations by another constraint"):
        peftk.PeftModel.from_pretrained(net(), path, dialect="comfyui")


def test_files_of_diffusers(tmp_path: Path) -> None:
    """As `save_lora_adapter` writes them: names of the model, and the configuration in the header."""
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8}
    kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1}
    kinds |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4}
    base = diffusers.UNet2DConditionModel(**sizes, **kinds).eval()
    theirs = copy.deepcopy(base)
    targets = ["to_q", "to_v", "conv1"]
    patterns = {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_v": 5}}
    theirs.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False, **patterns))
    theirs.save_lora_adapter(tmp_path)
    image, words = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    expected = theirs(image, 1, words).sample.detach()
    model = peftk.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "pytorch_lora_weights.safetensors")
    assert_close(model(image, 1, words).sample, expected.double(), torch.float32)
    # The folder is no adapter of PEFT, and the message says what is in it.
    with pytest.raises(CheckpointError, match=r"pytorch_lora_weights\.safetensors is there, and has .*bare names"):
        peftk.PeftModel.from_pretrained(base, tmp_path)


Keys = dict[str, Tensor]
DAMAGE: dict[str, tuple[str, Any]] = {
    "a module that the model has not": ("no module of this name", lambda t: t | _renamed(t, "first", "fourth")),
    "a missing factor": ("lora_up.weight missing", lambda t: _without(t, "lora_unet_first.lora_up.weight")),
    "a rank that differs": ("expected the rank 3", lambda t: t | {"lora_unet_first.lora_up.weight": torch.ones(16, 2)}),
    "another shape": ("shape expected", lambda t: t | {"lora_unet_first.lora_down.weight": torch.ones(3, 11)}),
    "alpha of zero": (
        "alpha: expected a finite number above 0",
        lambda t: t | {"lora_unet_first.alpha": torch.zeros(())},
    ),
    "NaN": ("finite", lambda t: t | {"lora_unet_first.lora_up.weight": torch.full((16, 3), torch.nan)}),
    "two dialects": ("several dialects", lambda t: t | {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}),
    "two methods": ("expected one in the file", lambda t: t | _loha("lora_unet_block_point", 4, 8)),
    "a key of no adapter": ("of no adapter", lambda t: t | {"lora_unet_first.something": torch.ones(2)}),
    "an embedding": (
        "lora_embedding_A, lora_embedding_B: peftk cannot load it",
        lambda t: {f"unet.first.lora_embedding_{f}": torch.ones(n, n) for f, n in (("A", 2), ("B", 2))},
    ),
    "a core behind a whole kernel": (
        "lora_mid",
        lambda t: t | {"lora_unet_block_conv_in.lora_mid.weight": torch.ones(2, 2, 3, 3)},
    ),
    "magnitudes of neither": ("of the 12 inputs", lambda t: t | {"lora_unet_first.dora_scale": torch.ones(1, 11)}),
    "magnitudes of outputs and of inputs": (
        "numbers of outputs on all modules, or of inputs on all",
        lambda t: t | {"lora_unet_first.dora_scale": torch.ones(16, 1)} | _of_inputs("lora_unet_block_conv_in", t),
    ),
    "magnitudes of one": ("on all modules or on none", lambda t: t | {"lora_unet_first.dora_scale": torch.ones(16, 1)}),
    "blocks that are no outputs": (
        r"blocks \* b = 16, the outputs of the layer",
        lambda t: {"lora_unet_first.oft_blocks": torch.ones(3, 5, 5)},
    ),
    "a constraint below zero": (
        "alpha: expected one number from 0",
        lambda t: {"lora_unet_first.oft_blocks": torch.ones(2, 8, 8), "lora_unet_first.alpha": torch.tensor(-1.0)},
    ),
    "factors of another number": (
        "rescale: expected 16 numbers",
        lambda t: {"lora_unet_first.oft_blocks": torch.ones(2, 8, 8), "lora_unet_first.rescale": torch.ones(12, 1)},
    ),
    "a bias beside a whole weight": (
        "diff_b: the change of a bias",
        lambda t: {"lora_unet_first.diff": torch.ones(16, 12), "lora_unet_first.diff_b": torch.ones(16)},
    ),
    "a bias alone": ("no method has just diff_b", lambda t: {"lora_unet_first.diff_b": torch.ones(16)}),
    "a norm": (
        "the change of a norm layer",
        lambda t: {"lora_unet_first.w_norm": torch.ones(16), "lora_unet_first.b_norm": torch.ones(16)},
    ),
    "magnitudes beside a whole weight": (
        "dora_scale: expected none beside diff",
        lambda t: {"lora_unet_first.diff": torch.ones(16, 12), "lora_unet_first.dora_scale": torch.ones(16, 1)},
    ),
}


def _renamed(tensors: Keys, old: str, new: str) -> Keys:
    return {key.replace(f"unet_{old}", f"unet_{new}"): value for key, value in tensors.items()}


def _of_inputs(module: str, tensors: Keys) -> Keys:
    down = tensors[f"{module}.lora_down.weight"]
    return {f"{module}.dora_scale": torch.ones(1, down.shape[1], 1, 1)}


def _without(tensors: Keys, name: str) -> Keys:
    return {key: value for key, value in tensors.items() if key != name}


def _loha(name: str, outputs: int, inputs: int) -> Keys:
    left, right = torch.ones(outputs, 2), torch.ones(2, inputs)
    return {
        f"{name}.hada_{key}": value
        for key, value in zip(("w1_a", "w1_b", "w2_a", "w2_b"), (left, right) * 2, strict=True)
    }


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_wrong_is_named_and_changes_nothing(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    kohya(path)
    tensors = {key: value for key, value in load_file(path).items() if "_te_" not in key}
    message, change = DAMAGE[damage]
    save_file({key: value.clone() for key, value in change(tensors).items()}, path)
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        peftk.PeftModel.from_pretrained(model, path)
    assert str(caught.value).startswith(str(path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    adapted = peftk.get_peft_model(net(), peftk.LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(CheckpointError, match=message):
        adapted.load_adapter(path, "other")
    assert list(adapted.peft_config) == ["default"]


def test_a_whole_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    for shape in ((16, 11), (15, 12), (16, 12, 2), (12, 16)):
        save_file({"lycoris_first.diff": torch.ones(shape)}, tmp_path / "file.safetensors")
        with pytest.raises(CheckpointError, match=r"lycoris_first|first\.lokr_w2"):
            peftk.PeftModel.from_pretrained(net(), tmp_path / "file.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_weight_is_added_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    base = net()
    diff = torch.randn(base.first.weight.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    tensors = {"lycoris_first.diff": diff, "lycoris_first.diff_b": torch.zeros(16, dtype=dtype)}
    save_file(tensors, tmp_path / "file.safetensors")
    expected = base.first.weight + diff.float()
    model = peftk.PeftModel.from_pretrained(base, tmp_path / "file.safetensors")
    assert model.peft_config["default"].decompose_factor == 1
    assert torch.equal(model.merge_and_unload().first.weight, expected)


def test_a_name_that_fits_two_modules_is_refused(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.ModuleDict({"c": nn.Linear(4, 4)})
            self.a = nn.ModuleDict({"b_c": nn.Linear(4, 4)})

    path = tmp_path / "adapter.safetensors"
    factors = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2)}
    save_file({f"lora_unet_a_b_c.{key}": value for key, value in factors.items()}, path)
    with pytest.raises(CheckpointError, match=r"a_b\.c and a\.b_c|a\.b_c and a_b\.c"):
        peftk.PeftModel.from_pretrained(Twice(), path)


def test_a_file_of_peft_alone_has_no_alpha(tmp_path: Path) -> None:
    peftk.get_peft_model(net(), peftk.LoraConfig(r=2, target_modules=["first"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json beside it.*pass the folder"):
        peftk.PeftModel.from_pretrained(net(), tmp_path / "adapter_model.safetensors")
