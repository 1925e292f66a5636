"""Operations on whole models take work in proportion to their layers, adapters and names: counted, not timed."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file

import peftk
from benchmarks.bench_model import OPERATIONS, Subject
from peftk.models.adapter_source import read_source
from peftk.models.convert import convert
from peftk.models.convert_plan import plan_for


def calls(subject, operation):
    """Count the calls of functions, of Python and of C, that an operation makes once it has run before."""
    step = OPERATIONS[operation].step
    return counted(lambda: step(subject))


def counted(step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step()
        count = 0

        def note(_frame, event, _argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            step()
        finally:
            sys.setprofile(None)
    return count


def grows(make, operation, sizes):
    """Return how many times as much work three times the additional size takes; 3 where it is linear."""
    first, second, third = (calls(make(size), operation) for size in sizes)
    return (third - first) / max(second - first, 1)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_work_is_linear_in_the_layers(operation, tmp_path):
    # From 16 layers on 16, and 48.
    growth = grows(lambda n: Subject(peftk, n, tmp_path / str(n)), operation, (16, 32, 64))
    assert 2.5 < growth < 3.3


@pytest.mark.parametrize("operation", OPERATIONS)
def test_work_is_linear_in_the_adapters(operation, tmp_path):
    few, some, many = (calls(Subject(peftk, 8, tmp_path / str(n), adapters=n), operation) for n in (1, 9, 25))
    assert many - few <= 3.3 * max(some - few, 0.05 * few)


class Trained(Subject):
    """A model of which one module in four is trained in full, by its whole name, and every bias."""

    def config(self):
        saved = [f"layers.{i}.o_proj" for i in range(self.layers // 4)]
        names = ["q_proj", "k_proj", "v_proj"]
        return peftk.LoraConfig(r=2, target_modules=names, modules_to_save=saved, bias=self.bias)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("operation", ["wrap", "from-file", "load-over", "choose", "save", "block"])
def test_work_is_linear_in_the_modules_that_are_trained_in_full(operation, bias, tmp_path, monkeypatch):
    monkeypatch.setattr(Trained, "bias", bias, raising=False)
    growth = grows(lambda n: Trained(peftk, n, tmp_path / str(n)), operation, (32, 96, 224))
    assert 2.9 < growth < 3.1


@pytest.mark.parametrize("operation", ["wrap", "from-file", "add", "load"])
def test_work_is_linear_in_the_names(operation, tmp_path):
    few, some, many = (calls(Subject(peftk, 64, tmp_path / str(n), names=n), operation) for n in (0, 16, 48))
    assert many - few <= 3.3 * max(some - few, 0.05 * few)


@pytest.mark.parametrize("dialect", ["peft", "diffusers", "kohya"])
def test_converting_is_linear_in_the_modules(dialect, tmp_path):
    """Each with an alpha of its own, which the configuration of PEFT and the header of diffusers have as a pattern."""

    def work(count):
        tensors, weights = {}, {}
        for number in range(count):
            name = f"lora_unet_blocks_{number}_to_q"
            tensors |= {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
            tensors[f"{name}.alpha"] = torch.tensor(float(number + 1))
            weights[f"blocks.{number}.to_q"] = torch.Size((4, 4))
        save_file(tensors, tmp_path / str(count))

        def step():
            source = read_source(tmp_path / str(count))
            convert(source, plan_for(source, dialect, weights=weights), tmp_path / f"{dialect}{count}", force=True)

        return counted(step)

    few, some, many = (work(count) for count in (100, 300, 700))
    assert 1.8 < (many - some) / (some - few) < 2.4
