"""DistributedDataParallel round adapted models, on two processes of this machine."""

from __future__ import annotations

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.toy_model import lora, oft, toy
from torch.nn.parallel import DistributedDataParallel

from peftk.models.peft_model import get_peft_model
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
