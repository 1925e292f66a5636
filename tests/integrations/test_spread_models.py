"""Accelerated models under DistributedDataParallel and both kinds of FSDP, on two processes of this machine."""

from __future__ import annotations

from datetime import timedelta

import peft
import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from support.peft_layers import LINEAR, METHODS, adapted, error, inputs
from torch import nn

import peftk

RANKS = 2
OPTIONS = {name: 0.0 for name in ("lora_dropout", "rank_dropout", "module_dropout", "boft_dropout")}
WRAPS = ("ddp", "fsdp1", "fsdp2")
# PEFT 0.19's BOFT assigns its base layer a bias, which FSDP1's views of a parameter do not allow.
REFUSED = {("boft", "fsdp1")} if Version(peft.__version__) < Version("0.20") else set()


def model_of(method: str) -> nn.Module:
    """Return a model whose dropout is off, with parameters of one dtype."""
    model = adapted(method, 1, target_modules=LINEAR, use_dora=False, coft=False)
    for module in model.modules():
        for name in OPTIONS:
            values = getattr(module, name, None)
            if isinstance(values, dict):
                values.update(dict.fromkeys(values, 0.0))
            elif isinstance(values, nn.ModuleDict):
                for key in values:
                    values[key] = nn.Identity()
    return model


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    """Spread a model over the ranks."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def work(rank: int, folder: str) -> None:
    """Run every method under every kind, accelerated before and after it, forward and backward."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timedelta(minutes=2))
    try:
        results = {}
        args = tuple(t.detach().chunk(RANKS)[rank] for t in inputs())
        for method in METHODS:
            for kind in WRAPS:
                if (method, kind) in REFUSED:
                    continue
                found = []
                for when in ("never", "before", "after"):
                    model = model_of(method)
                    if when == "before":
                        peftk.accelerate(model, strict=True)
                    spread = wrapped(model, kind)
                    if when == "after":
                        peftk.accelerate(spread)
                    y = spread(*args)
                    y.square().sum().backward()
                    whole = [
                        getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
                        for p in spread.parameters()
                        if p.grad is not None
                    ]
                    found.append((y.detach(), whole))
                results[method, kind] = found
        torch.save(results, f"{folder}/rank{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_spread_models_are_those_of_peft(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=RANKS)
    for rank in range(RANKS):
        for (method, kind), found in torch.load(tmp_path / f"rank{rank}").items():
            (expected, gradients), *others = found
            assert gradients or kind == "fsdp1", (method, kind)
            for y, got in others:
                assert error(y, expected) < 1e-5, (method, kind)
                for one, other in zip(got, gradients, strict=True):
                    # PEFT's gradient of C3A's input, and of what is below it, is not that of its value.
                    assert method == "c3a" or error(one, other) < 1e-4, (method, kind)
