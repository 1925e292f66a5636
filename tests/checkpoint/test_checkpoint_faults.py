"""Well-formed files that do not fit the model: none is applied, each is refused by the key at fault."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.checkpoint_files import WEIGHTS
from torch import Tensor

from peftk.checkpoint import CheckpointError, read_adapter


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous()


FAULTS = {
    "dropped": lambda t, k, r: t.pop(k),
    "renamed": lambda t, k, r: t.update({k[:-1] + r.choice("abc"): t.pop(k)}),
    "upper case": lambda t, k, r: t.update({k.upper(): t.pop(k)}),
    "adapter name in key": lambda t, k, r: t.update({k.replace(".weight", ".default.weight"): t.pop(k)}),
    "prefix lost": lambda t, k, r: t.update({k.removeprefix("base_model.model."): t.pop(k)}),
    "extra": lambda t, k, r: t.update({k + ".extra": torch.zeros(1)}),
    "nan": lambda t, k, r: t[k].view(-1).__setitem__(r.randrange(t[k].numel()), math.nan),
    "inf": lambda t, k, r: t[k].view(-1).__setitem__(r.randrange(t[k].numel()), math.inf),
    "int32": lambda t, k, r: t.update({k: t[k].int()}),
    "bool": lambda t, k, r: t.update({k: t[k] > 0}),
    "uint8": lambda t, k, r: t.update({k: torch.zeros(t[k].shape, dtype=torch.uint8)}),
    "complex": lambda t, k, r: t.update({k: t[k].to(torch.complex64)}),
    "transposed": lambda t, k, r: t.update({k: transposed(t[k])}),
    "one row": lambda t, k, r: t.update({k: t[k][:1].clone()}),
    "one column": lambda t, k, r: t.update({k: t[k][:, :1].clone()}),
    "short": lambda t, k, r: t.update({k: t[k][:-1].clone()}),
    "flat": lambda t, k, r: t.update({k: t[k].reshape(-1)}),
    "extra dimension": lambda t, k, r: t.update({k: t[k][None]}),
    "scalar": lambda t, k, r: t.update({k: torch.tensor(1.0)}),
    "empty": lambda t, k, r: t.update({k: t[k][:0].clone()}),
    "all gone": lambda t, k, r: t.clear(),
    "swapped": lambda t, k, r: t.update({k: t[other(t, k)].clone(), other(t, k): t[k].clone()}),
}


def other(tensors: dict[str, Tensor], key: str) -> str:
    return next(name for name in tensors if tensors[name].shape != tensors[key].shape)


@pytest.mark.parametrize("fault", FAULTS)
def test_semantic_faults(tmp_path: Path, fault: str) -> None:
    rng = random.Random(fault)
    cases = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            rank, width, height = rng.sample(range(2, 12), 3)
            shapes = {
                f"base_model.model.layer.{i}.{name}.weight": shape
                for i in range(2)
                for name, shape in (("lora_A", (rank, width)), ("lora_B", (height, rank)))
            }
            tensors = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
            for key in tensors:
                mutated = {name: value.clone() for name, value in tensors.items()}
                FAULTS[fault](mutated, key, rng)
                safetensors.torch.save_file(mutated, tmp_path / WEIGHTS, {"format": "pt"})
                with pytest.raises(CheckpointError, match="key ") as caught:
                    read_adapter(tmp_path, shapes)
                assert fault == "all gone" or any(
                    key in problem or key[17:] in problem
                    for problem in (*caught.value.problems, *(problem.lower() for problem in caught.value.problems))
                )
                cases += 1
    assert cases == 96
