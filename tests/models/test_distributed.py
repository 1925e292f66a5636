"""Adapted models under DistributedDataParallel and both kinds of FSDP, on two processes of this machine."""

from __future__ import annotations

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.toy_model import lora, oft, toy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from peftk.models.peft_model import PeftModel, get_peft_model
from peftk.testing.compare import assert_close

RANKS = 2
CONFIGS = {
    "lora": lora(target_modules=["query", "value"], modules_to_save=["classifier"]),
    "oft": oft(target_modules=["query", "value"]),
    "coft": oft(coft=True, eps=0.1),
}


def batch():
    torch.manual_seed(7)
    return torch.randn(4 * RANKS, 12), torch.randn(4 * RANKS, 4)


def start(name):
    return get_peft_model(toy(), copy.deepcopy(CONFIGS[name]))


def step(model, x, target):
    """Take one step of training; return the gradients before it and the parameters after it."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    torch.nn.functional.mse_loss(model(x), target).backward()
    gradients = {name.removeprefix("module."): p.grad.clone() for name, p in trained.items()}
    optimizer.step()
    return gradients, {name.removeprefix("module."): p.detach().clone() for name, p in trained.items()}


def work(rank, folder):
    """Train on this rank's part of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timedelta(minutes=2))
    try:
        part = [t.chunk(RANKS)[rank] for t in batch()]
        results = {name: step(DistributedDataParallel(start(name)), *part) for name in CONFIGS}
        torch.save(results, f"{folder}/rank{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_ranks_average_their_gradients(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(RANKS)]
    for name in CONFIGS:
        gradients, after = step(start(name), *batch())
        alone, _ = step(start(name), *(t.chunk(RANKS)[0] for t in batch()))
        assert gradients.keys() == ranks[0][name][0].keys()
        for key, expected in gradients.items():
            first, second = (result[name][0][key] for result in ranks)
            assert torch.equal(first, second), key
            assert not torch.equal(first, alone[key]), key
            assert_close(first, expected.double(), torch.float32, what=key)
        for key, expected in after.items():
            first, second = (result[name][1][key] for result in ranks)
            assert torch.equal(first, second), key
            assert_close(first, expected.double(), torch.float32, what=key)


# Not offloaded to the CPU: of a model that is there, torch 2.13 reads memory that the older kind has given back.
FULL = StateDictOptions(full_state_dict=True)
SHARDED = {
    "older": lambda model, _mesh: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
    "newer": lambda model, mesh: fully_shard(model, mesh=mesh),
}


def save_sharded(rank, folder):
    """Train a step of models that are sharded over both ranks, and save their adapters alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timedelta(minutes=2))
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        part = [t.chunk(RANKS)[rank] for t in batch()]
        for name in ("lora", "oft"):
            for kind, shard in SHARDED.items():
                adapted = start(name)
                wrapped = shard(adapted, mesh)
                trained = [p for p in wrapped.parameters() if p.requires_grad]
                optimizer = torch.optim.SGD(trained, lr=0.1)
                torch.nn.functional.mse_loss(wrapped(part[0]), part[1]).backward()
                optimizer.step()
                state = get_model_state_dict(wrapped, options=FULL)
                adapted.save_pretrained(f"{folder}/{name}-{kind}", is_main_process=rank == 0, state_dict=state)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_adapters_of_sharded_models_are_saved_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(save_sharded, (str(tmp_path),), nprocs=RANKS)
    for name in ("lora", "oft"):
        _, after = step(start(name), *batch())
        for kind in SHARDED:
            assert sum(path.stat().st_size for path in (tmp_path / f"{name}-{kind}").iterdir()) < 20_000
            loaded = PeftModel.from_pretrained(toy(), tmp_path / f"{name}-{kind}", is_trainable=True)
            found = {key: p for key, p in loaded.named_parameters() if p.requires_grad}
            assert found.keys() == after.keys()
            for key, expected in after.items():
                assert_close(found[key].detach(), expected.double(), torch.float32, what=f"{kind} {key}")
