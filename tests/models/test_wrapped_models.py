"""Wrappers inside a model add parts to the names of modules; none of them is in a file or asked of a target."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import peftk
from peftk.checkpoint import CheckpointError
from peftk.models.names import clean_state, named_modules, place_of, unwrapped, without_wrappers
from peftk.nn import AdapterLayer

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.module = nn.Linear(8, 8)

    def forward(self, x):
        return self.module(self.fc(x))


def base():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 4))


CONFIGS = {
    "lora": peftk.LoraConfig(r=2, target_modules=["fc"], modules_to_save=["2"], bias="all", init_lora_weights=False),
    "loha": peftk.LoHaConfig(r=2, target_modules=["0.fc", "1.module"], init_weights=False),
    "oft": peftk.OFTConfig(
        oft_block_size=4, target_modules=r"\d\.fc", modules_to_save=["0.module"], init_weights=False
    ),
    "boft": peftk.BOFTConfig(boft_block_size=4, target_modules=["1.fc", "0.module"], init_weights=False),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process group of one, for FSDP and DDP."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        folder = tmp_path_factory.mktemp("meet")
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def blocks_in(kind):
    """Return a function that wraps the blocks of a model in place, or the model, and returns the model."""

    def wrap(model):
        inner = unwrapped(model)
        for name in ("0", "1"):
            inner._modules[name] = kind(inner._modules[name])
        return model

    return wrap


def layers_in(kind):
    def wrap(model):
        for block in (unwrapped(model)[0], unwrapped(model)[1]):
            block.fc, block.module = kind(block.fc), kind(block.module)
        unwrapped(model)._modules["2"] = kind(unwrapped(model)[2])
        return model

    return wrap


def compiled(module):
    return torch.compile(module, backend="eager")


def parallel(module):
    return nn.parallel.DistributedDataParallel(module)


WRAPPERS = {
    "checkpointed blocks": blocks_in(checkpoint_wrapper),
    "checkpointed layers": layers_in(checkpoint_wrapper),
    "compiled blocks": blocks_in(compiled),
    "compiled layers": layers_in(compiled),
    "a compiled model": compiled,
    "DDP": parallel,
    "DataParallel": nn.DataParallel,
    "several": lambda model: parallel(compiled(blocks_in(lambda m: compiled(checkpoint_wrapper(m)))(model))),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", WRAPPERS)
def test_files_of_wrapped_models_are_those_of_the_model(tmp_path, kind, method):
    config = CONFIGS[method]
    plain = peftk.get_peft_model(base(), config).eval()
    plain.save_pretrained(tmp_path / "plain")
    clean = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    expected = plain(X)
    # A clean file loads into a model that was wrapped before.
    wrapped = WRAPPERS[kind](base())
    loaded = peftk.PeftModel.from_pretrained(wrapped, tmp_path / "plain")
    assert torch.equal(loaded(X), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == clean.keys() and all(torch.equal(again[key], clean[key]) for key in clean)
    assert [path for path, _ in loaded.base_model._layers()] == [path for path, _ in plain.base_model._layers()]
    # It is taken off again without a trace, and merged.
    off = loaded.unload()
    assert not any(isinstance(module, AdapterLayer) for module in off.modules())
    assert torch.equal(off(X), base()(X))
    merged = peftk.PeftModel.from_pretrained(WRAPPERS[kind](base()), tmp_path / "plain").merge_and_unload()
    torch.testing.assert_close(merged(X), expected)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", ["checkpointed blocks", "checkpointed layers", "compiled blocks"])
def test_models_that_are_wrapped_after_they_were_adapted(tmp_path, kind, method):
    model = peftk.get_peft_model(base(), CONFIGS[method]).eval()
    model.save_pretrained(tmp_path / "before")
    expected = model(X)
    WRAPPERS[kind](model.get_base_model())
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("before", "after")]
    assert configs[0] == configs[1]
    assert torch.equal(peftk.PeftModel.from_pretrained(base(), tmp_path / "after")(X), expected)
    # Values of another adapter are loaded over it.
    other = peftk.get_peft_model(base(), CONFIGS[method])
    for parameter in other.parameters():
        parameter.data.mul_(1.5 if parameter.requires_grad else 1.0)
    other.save_pretrained(tmp_path / "other")
    model.load_adapter(tmp_path / "other", "default")
    assert torch.equal(model(X), other.eval()(X))
    assert peftk.get_layer_status(model)[0].name.startswith(("model.0.fc", "model.1.fc", "model.0.module"))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("method", CONFIGS)
def test_fsdp(tmp_path, method):
    from torch.distributed.fsdp import FullyShardedDataParallel

    config = copy.deepcopy(CONFIGS[method])
    if hasattr(config, "bias"):
        config.bias = "none"
    model = peftk.get_peft_model(base(), config).eval()
    model.save_pretrained(tmp_path / "before")
    expected = model(X)
    inner = model.get_base_model()
    for name in ("0", "1"):
        inner._modules[name] = FullyShardedDataParallel(
            inner._modules[name], use_orig_params=True, device_id=torch.device("cpu")
        )
    assert any("_fsdp_wrapped_module" in name for name, _ in model.named_modules())
    with FullyShardedDataParallel.summon_full_params(model):
        model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    torch.testing.assert_close(peftk.PeftModel.from_pretrained(base(), tmp_path / "after")(X), expected)


@pytest.mark.parametrize("part", ["_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"])
def test_names_and_keys_that_hold_the_parts_of_wrappers_lose_them(tmp_path, part):
    config = peftk.LoraConfig(r=2, target_modules=[f"0.{part}.fc", "1.fc"], init_lora_weights=False)
    model = peftk.get_peft_model(base(), config).eval()
    assert model.peft_config["default"].target_modules == {"0.fc", "1.fc"}
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    # As PEFT writes it.
    save_file({key.replace(".0.", f".0.{part}."): value for key, value in load_file(file).items()}, file)
    assert torch.equal(peftk.PeftModel.from_pretrained(base(), tmp_path)(X), model(X))
    save_file({**load_file(file), "base_model.model.0.fc.lora_A.weight": torch.zeros(2, 8)}, file)
    with pytest.raises(CheckpointError, match=r"two keys, .* become one"):
        peftk.PeftModel.from_pretrained(base(), tmp_path)


def test_names():
    model = blocks_in(lambda module: compiled(checkpoint_wrapper(module)))(base())
    assert [name for name, _ in named_modules(model)] == [name for name, _ in base().named_modules()]
    assert all(type(module) in (nn.Sequential, Block, nn.Linear) for _, module in named_modules(model))
    assert [clean_state(model, key) for key in model.state_dict()] == list(base().state_dict())
    # `module` is a name like any other where no wrapper of that kind holds it.
    assert place_of(model, "0.module") == (unwrapped(model[0]), "module")
    holder, name = place_of(model, "0")
    assert holder._modules[name] is unwrapped(model[0])
    with pytest.raises(AttributeError):
        place_of(model, "0.nothing")
    assert without_wrappers("a._orig_mod.b_orig_mod.module") == "a.b_orig_mod.module"
